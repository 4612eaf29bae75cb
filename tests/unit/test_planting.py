"""Planted lines: there to be found, asked for once, and counted where the answer is predicted."""

import pytest
import torch

from kvprofile.calibration.planting import plant
from kvprofile.calibration.probe_mix import KINDS, ProbeMix
from kvprofile.calibration.probes import UNCOUNTED, make_probe
from kvprofile.errors import UsageError


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


LETTERS = Letters()
TEXT = torch.tensor([ord(letter) for letter in "The hare ran far. It slept under a hedge! Why?\n" * 60])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("facts", "lookups"), [(0, 3), (4, 0), (3, 5)])
def test_what_is_asked_for_stands_in_the_context_once_and_at_the_end_of_a_sentence(facts, lookups, seed):
    context, questions = plant(TEXT, LETTERS, facts=facts, lookups=lookups, seed=seed)
    assert len(context) == len(TEXT)
    assert context[0] == TEXT[0]
    written = LETTERS.decode(context.tolist())
    assert sorted(question.kind for question in questions) == ["facts"] * facts + ["lookup"] * lookups
    for question in questions:
        asked = LETTERS.decode(question.tokens.tolist())
        answer = asked[-question.answer :].strip()
        assert answer
        assert asked.strip().endswith(answer)
        if question.kind == "lookup":
            assert written.count(f"\n{asked.strip()}\n") == 1
        else:
            assert written.count(answer) == 1
    added = [line for line in written.split("\n") if ": " in line]
    assert len(added) == facts + lookups
    for line in added:
        assert written[written.index(f"\n{line}\n") - 1] in ".!?\n"
    # What is left of the text is the end of it, in order.
    rest = written
    for line in added:
        rest = rest.replace(f"\n{line}\n", "", 1)
    assert LETTERS.decode(TEXT.tolist()).endswith(rest[1:])


def test_planting_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (plant(TEXT, LETTERS, facts=2, lookups=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert [question.tokens.tolist() for question in first[1]] == [question.tokens.tolist() for question in again[1]]


def test_nothing_planted_leaves_the_context_as_it_is():
    context, questions = plant(TEXT, LETTERS, facts=0, lookups=0, seed=0)
    assert context is TEXT
    assert questions == []


def test_a_probe_counts_the_tokens_that_predict_an_answer():
    context, questions = plant(TEXT, LETTERS, facts=2, lookups=2, seed=3)
    mix = ProbeMix(passages=2, passage_tokens=5, continuation_tokens=7, facts=2, lookups=2)
    probe = make_probe(context, torch.arange(50), 0, mix=mix, questions=questions)
    assert (probe.kind[:7] == KINDS.index("continuation")).all()
    assert (probe.kind[7:17] == KINDS.index("recall")).all()
    place = 17
    for question in questions:
        assert torch.equal(probe.tokens[place : place + len(question.tokens)], question.tokens)
        for offset in range(len(question.tokens)):
            # A token counts if the one after it belongs to the answer.
            predicts = len(question.tokens) - question.answer <= offset + 1 < len(question.tokens)
            expected = KINDS.index(question.kind) if predicts else UNCOUNTED
            assert probe.kind[place + offset] == expected
        place += len(question.tokens)
    assert place == len(probe.tokens) == len(probe.kind)


def test_a_mix_knows_its_kinds_and_refuses_what_cannot_be_read():
    assert ProbeMix().kinds == ("recall", "continuation")
    assert ProbeMix(passages=0, lookups=1).kinds == ("continuation", "lookup")
    with pytest.raises(UsageError, match="negative"):
        ProbeMix(facts=-1)
    with pytest.raises(UsageError, match="empty"):
        ProbeMix(passages=0, continuation_tokens=0)


def test_answers_differ_between_lines():
    _, questions = plant(TEXT, LETTERS, facts=0, lookups=8, seed=5)
    answers = [tuple(question.tokens[-question.answer :].tolist()) for question in questions]
    assert len(set(answers)) == len(answers)


def test_a_mix_is_read_from_the_command_line():
    assert ProbeMix.parse("") == ProbeMix()
    assert ProbeMix.parse("passages=2, lookups=8") == ProbeMix(passages=2, lookups=8)
    for wrong in ("lookups", "lookups=", "lookups=-1", "lookups=x", "riddles=3"):
        with pytest.raises(UsageError, match="expected a name and a whole number"):
            ProbeMix.parse(wrong)
