"""Tasks ask what can be answered from their context, where they say, and within their length."""

import csv
import hashlib
import json
import random
import re
import string

import pytest

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.evaluate.tasks import TASKS, Request
from kvprofile.evaluate.tasks.haystack import hide
from kvprofile.evaluate.tasks.longbench import METRICS, score
from kvprofile.evaluate.tasks.longbench_prompts import ANSWER_TOKENS, PROMPTS


def words(text):
    return len(text.split())


def cut(text, tokens):
    parts = text.split()
    return (
        text if len(parts) <= tokens else " ".join(parts[: tokens // 2] + parts[len(parts) - (tokens - tokens // 2) :])
    )


def head(text, tokens):
    return " ".join(text.split()[:tokens])


def request(source="", *, count=3, tokens=600, seed=0):
    return Request(source, count, tokens, seed, words, cut, head)


def made(name, *arguments, **options):
    return TASKS[name].examples(request(*arguments, **options))


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    path = tmp_path_factory.mktemp("wiki") / "madlibs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["context", "question", "answer"])
        writer.writeheader()
        for number in range(30):
            context = f"Person {number} lives at {number * 7}. " + f"Filler about {number}. " * 20
            for question, answer in (("Where?", f"{number * 7} | at {number * 7}"), ("Who?", f"Person {number}")):
                writer.writerow({"context": context, "question": f"{question} {number}", "answer": answer})
    return path


@pytest.mark.parametrize("name", ["encyclopedia", "needle", "ruler", "key-value"])
def test_offline_tasks_fit_hold_their_answers_and_repeat(name):
    examples = made(name)
    assert examples == made(name)
    assert examples != made(name, seed=1)
    longest = max(words(example.context) for example in examples)
    assert 300 < longest <= 600
    for example in examples:
        answers = example.answers[1:] or example.answers
        for answer in answers:
            assert answer in example.context
            assert answer not in example.question + example.prefix
        # A perfect answer scores all, an empty one nothing.
        assert TASKS[name].score(example.answers[0], example) == 1
        assert TASKS[name].score("", example) == 0
    groups = [example.group for example in examples]
    assert {groups.count(group) for group in groups} == {3}


def test_a_gold_document_first_half_way_and_last(wiki):
    for examples in (made("encyclopedia", count=4), made("synthwiki", str(wiki), count=4)):
        for first, middle, last in zip(*(examples[start::3] for start in range(3)), strict=True):
            assert [example.group for example in (first, middle, last)] == ["first", "half-way", "last"]
            assert first.question == middle.question == last.question
            places = [
                example.context.find(example.answers[0]) / len(example.context) for example in (first, middle, last)
            ]
            assert places[0] < 0.35 < places[1] < 0.75 < places[2]
            # The same documents in another order.
            assert len({tuple(sorted(example.context.split("\n\n"))) for example in (first, middle, last)}) == 1


def test_synthwiki_answers_and_refusals(wiki, tmp_path):
    for example in made("synthwiki", str(wiki), count=30):
        gold = int(re.search(r"\d+$", example.question).group())
        assert example.answers in ((str(gold * 7), f"at {gold * 7}"), (f"Person {gold}",))
    with pytest.raises(UsageError, match="synthwiki:FILE"):
        made("synthwiki")
    (tmp_path / "other.csv").write_text("text,question\na,b\n")
    with pytest.raises(KVProfileError, match="no column context, answer"):
        made("synthwiki", str(tmp_path / "other.csv"))


def test_needles_lie_at_their_depth():
    for example in made("needle", tokens=2000):
        tokens, depth = example.place
        assert tokens in (500, 1000, 2000)
        assert words(example.context) <= tokens
        assert words(example.context) > tokens - 60
        before = words(example.context.partition(f" is {example.answers[0]}.")[0]) / words(example.context)
        assert before == pytest.approx(depth, abs=0.13)
    assert len({example.place for example in made("needle")}) == 15


def test_hay_from_a_folder_and_too_little_of_it(tmp_path):
    (tmp_path / "essay.txt").write_text(" ".join(f"Sentence {number} is here." for number in range(400)))
    examples = made("needle", str(tmp_path), count=1, tokens=400)
    assert all(len(re.findall(r"Sentence \d+ is here\.", example.context)) > 15 for example in examples)
    with pytest.raises(KVProfileError, match="too short"):
        made("needle", str(tmp_path), tokens=4000)


def test_needles_keep_their_order():
    hay = [f"hay {number}." for number in range(50)]
    text = hide([(0.0, "A."), (0.5, "B."), (0.5, "C."), (1.0, "D.")], hay, 60, words)
    assert [part for part in text.split() if part in ("A.", "B.", "C.", "D.")] == ["A.", "B.", "C.", "D."]
    assert text.startswith("A. hay 0.")
    assert text.endswith(" D.")
    assert words(text) in (59, 60)


def test_variables_can_be_followed_by_reading():
    for example in made("ruler", "variables", count=8):
        values = {}
        for name, value, other in re.findall(r"Variable (\w+) has the value (?:(\d+)|of (\w+))\.", example.context):
            values[name] = value or values[other]
        asked = re.search(r"value (\d+)", example.question).group(1)
        assert sorted(name for name, value in values.items() if value == asked) == sorted(example.answers[1:])
        assert TASKS["ruler"].score(example.answers[1], example) == 0.25
    with pytest.raises(UsageError, match="multi-key, multi-value, variables"):
        made("ruler", "nothing")


def test_key_value_pairs_can_be_looked_up():
    for example in made("key-value", count=5):
        pairs = json.loads(example.context[example.context.index("{") :])
        key = json.loads(example.prefix.removesuffix(":"))
        assert f'"{pairs[key]}"' == example.answers[0]
        quarter = int(4 * list(pairs).index(key) / len(pairs)) + 1
        assert example.group == f"quarter {quarter}"
    with pytest.raises(UsageError, match="too short"):
        made("key-value", tokens=12)


# LongBench


@pytest.fixture(scope="module")
def longbench(tmp_path_factory):
    """Two rows of every task, with a folder's name that holds them."""
    folder = tmp_path_factory.mktemp("longbench")
    draw = random.Random(0)
    for name in PROMPTS:
        rows = [
            {
                "context": " ".join(draw.choice(string.ascii_lowercase) * 3 for _ in range(300)),
                "input": f"{{what}} {name} {number}?",
                "answers": [f"Paragraph {number}", f"{name}"],
                "all_classes": ["City", "Country"],
                "length": 300,
            }
            for number in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qasper_e.jsonl").write_text((folder / "qasper.jsonl").read_text())
    return folder


def test_the_prompts_are_the_official_ones():
    """SHA-256 of LongBench's own config files, cut down to the sixteen tasks."""
    assert len(PROMPTS) == len(METRICS) == len(ANSWER_TOKENS) == 16
    assert PROMPTS.keys() == METRICS.keys() == ANSWER_TOKENS.keys()
    digests = [
        hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() for values in (PROMPTS, ANSWER_TOKENS)
    ]
    assert digests == [
        "75e339f4f58566663b9e2916d85ca7258191b614158272128161675baece6c42",
        "08dd2e8d318528c673edc6b972dec0dd30d238460d8a0c4e8a785889bd903111",
    ]


def test_a_prompt_in_one_piece_is_the_official_prompt(longbench):
    examples = made("longbench", f"all:{longbench}", tokens=2000, count=2)
    assert [example.group for example in examples] == [name for name in PROMPTS for _ in range(2)]
    for example in examples:
        rows = [json.loads(line) for line in (longbench / f"{example.group}.jsonl").read_text().splitlines()]
        assert example.context + example.question in [PROMPTS[example.group].format(**row) for row in rows]
        assert example.chat == (example.group not in ("trec", "triviaqa", "samsum", "lcc", "repobench-p"))
        assert example.prefix == ""


def test_a_context_too_long_loses_its_middle(longbench):
    example = made("longbench", f"hotpotqa:{longbench}", tokens=200, count=1)[0]
    whole = made("longbench", f"hotpotqa:{longbench}", tokens=2000, count=1)[0]
    assert words(example.context + example.question) + example.max_new_tokens <= 200
    assert whole.context.startswith(example.context[:200])
    assert whole.context.endswith(example.context[-100:])
    assert example.question == whole.question
    with pytest.raises(UsageError, match="leaves no room"):
        made("longbench", f"hotpotqa:{longbench}", tokens=64)


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "expected"),
    [
        ("qasper", "the cat sat", ("a dog", "cat sat down"), 0.8),
        ("triviaqa", "\nParis\nPassage: and so on", ("Paris",), 1.0),
        ("qasper_e", "Paris\nand London", ("Paris",), 0.5),
        ("trec", "City\nQuestion: Country", ("City",), 1.0),
        ("samsum", "police the gunman\nDialogue: more", ("police killed the gunman",), 6 / 7),
        ("passage_retrieval_en", "Paragraph 3", ("Paragraph 3",), 1.0),
        ("passage_count", "5, no 6", ("6",), 0.5),
        ("lcc", "x = 1\ny = 2", ("x = 1",), 1.0),
        ("gov_report", "police kill the gunman", ("police killed the gunman",), 0.75),
    ],
)
def test_every_kind_of_score(task, prediction, answers, expected, longbench):
    example = made("longbench", f"{task}:{longbench}", tokens=2000, count=1)[0]
    example = type(example)(**{**vars(example), "answers": answers})
    assert score(prediction, example) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "longbench:TASKS|needs its tasks"),
        ("dureader", "no English or code task 'dureader'"),
        ("qasper:nowhere", "no such folder: 'nowhere'"),
        ("qasper,lsht:{folder}", "'lsht'"),
        ("samsum_e:{folder}", "no such file"),
        ("all:{empty}", "no LongBench task"),
    ],
)
def test_longbench_refusals(source, message, longbench, tmp_path):
    with pytest.raises(KVProfileError, match=message):
        made("longbench", source.format(folder=longbench, empty=tmp_path))


# ZeroSCROLLS


@pytest.fixture
def zeroscrolls(tmp_path):
    (tmp_path / "qasper").mkdir()
    instruction, document = "You are given an article.\n\nArticle:\n", "word " * 300 + "end."
    question = "\n\nQuestion:\nWhat is it?\n\nAnswer:\n"
    rows = [
        {
            "id": name,
            "pid": f"{name}_{number}",
            "input": instruction + f"{name} " + document + question,
            "output": f"answer {number} of {name}",
            "document_start_index": len(instruction),
            "document_end_index": len(instruction) + len(f"{name} ") + len(document),
            "query_start_index": len(instruction) + len(f"{name} ") + len(document) + 2,
            "query_end_index": 0,
            "truncation_seperator": "... [The rest is omitted]",
        }
        for name in ("one", "two")
        for number in range(2)
    ]
    (tmp_path / "qasper" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_zeroscrolls_prompts_and_references(zeroscrolls):
    whole = made("zeroscrolls", f"qasper:{zeroscrolls}", tokens=1000)
    assert sorted(example.answers for example in whole) == [
        ("answer 0 of one", "answer 1 of one"), ("answer 0 of two", "answer 1 of two"),
    ]  # fmt: skip
    inputs = {
        json.loads(line)["input"] for line in (zeroscrolls / "qasper" / "validation.jsonl").read_text().splitlines()
    }
    assert {example.context + example.question for example in whole} == inputs
    assert TASKS["zeroscrolls"].score("answer 1", whole[0]) == pytest.approx(2 * 2 / 6)
    for example in made("zeroscrolls", f"qasper:{zeroscrolls}", tokens=250):
        assert example.context.endswith("word... [The rest is omitted]")
        assert words(example.context + example.question) + example.max_new_tokens <= 250
    for source, message in (
        ("qasper", "a folder"),
        (f"other:{zeroscrolls}", "'other'"),
        (f"quality:{zeroscrolls}", "quality.zip"),
    ):
        with pytest.raises(UsageError, match=message):
            made("zeroscrolls", source)
