"""Token blocks: exact in number and length, disjoint, deterministic, and honest about too little text."""

import hashlib
import re
import struct
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.samples import Document, entries, load_documents, make_samples

WORDS = 30_000
UNK, BOS = 0, 1


def _word(number, long=False):
    return f"w{number}" + "x" * (20 * long)


def _word_tokenizer(*, bos=False, long=False):
    """One id a word, every word known: two equal ids mean that the same text was used twice."""
    vocabulary = {"[UNK]": UNK, "[BOS]": BOS} | {_word(number, long): number for number in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]" if bos else None, model_max_length=16
    )


def _byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {(bos, long): _word_tokenizer(bos=bos, long=long) for bos in (False, True) for long in (False, True)}
PLAIN = TOKENIZERS[False, False]
BYTES = _byte_tokenizer()


class Counting:
    """A tokenizer that counts the characters it is given."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


def _unique_documents(sizes, *, kinds=("text",), per_line=10, long=False):
    """Documents of the given numbers of words; no word occurs twice anywhere."""
    documents, first = [], 2
    for number, size in enumerate(sizes):
        words = [_word(first + place, long) for place in range(size)]
        first += size
        lines = [" ".join(words[start : start + per_line]) for start in range(0, size, per_line)]
        documents.append(Document("\n".join(lines), kinds[number % len(kinds)], f"d{number}"))
    assert first <= WORDS
    return documents


def _ids(sample):
    return sample.context.tolist() + sample.continuation.tolist()


def _all(result):
    return result.calibration + result.held_out


@given(
    sizes=st.lists(st.integers(1, 700) | st.integers(1, 40), min_size=1, max_size=12),
    per_line=st.sampled_from([3, 40, 10_000]),
    long=st.booleans(),
    bos=st.booleans(),
    samples=st.integers(1, 6),
    held_out=st.integers(0, 4),
    tokens=st.integers(64, 90),
    continuation=st.integers(0, 20),
    seed=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_blocks_are_exact_and_disjoint_or_the_text_is_too_short(
    *, sizes, per_line, long, bos, samples, held_out, tokens, continuation, seed
):
    documents = _unique_documents(sizes, per_line=per_line, long=long)
    length = tokens - bos + continuation
    options = {"samples": samples, "tokens": tokens, "held_out": held_out, "continuation": continuation, "seed": seed}
    if sum(sizes) < (samples + held_out) * length:
        with pytest.raises(KVProfileError) as caught:
            make_samples(documents, TOKENIZERS[bos, long], **options)
        found, needed, missing = (
            int(re.search(rf"([\d,]+)(?: tokens)? {word}", str(caught.value))[1].replace(",", ""))
            for word in ("found", "needed", "missing")
        )
        assert (found, needed, missing) == (sum(sizes), (samples + held_out) * length, needed - sum(sizes))
        return

    result = make_samples(documents, TOKENIZERS[bos, long], **options)
    assert (len(result.calibration), len(result.held_out)) == (samples, held_out)
    seen = Counter()
    for sample in _all(result):
        assert sample.context.shape == (tokens,)
        assert sample.continuation.shape == (continuation,)
        assert sample.context.dtype == sample.continuation.dtype == torch.int64
        ids = _ids(sample)
        if bos:
            assert ids.pop(0) == BOS
        assert min(ids) > BOS  # no BOS inside, and no word cut in two
        seen.update(ids)
        _check_is_running_text(ids, sample.name.split(" + "), sizes)
    assert max(seen.values()) == 1


def _check_is_running_text(ids, names, sizes):
    """Words follow one another without a gap but where a named piece of text begins, and no other text is named."""
    starts = [2]
    for size in sizes:
        starts.append(starts[-1] + size)
    owners = {max(number for number, start in enumerate(starts[:-1]) if start <= word) for word in ids}
    assert set(names) == {f"d{number}" for number in owners}
    assert sum(after != before + 1 for before, after in pairwise(ids)) < len(names)


@given(
    sizes=st.lists(st.integers(150, 900), min_size=2, max_size=10),
    samples=st.integers(1, 5),
    held_out=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_parts_have_no_run_of_32_tokens_in_common(sizes, samples, held_out, seed):
    documents = _unique_documents(sizes)
    try:
        result = make_samples(documents, PLAIN, samples=samples, tokens=100, held_out=held_out, seed=seed)
    except KVProfileError:
        assert sum(sizes) < (samples + held_out) * 100
        return
    runs = [
        {tuple(ids[start : start + 32]) for ids in map(_ids, part) for start in range(len(ids) - 31)}
        for part in (result.calibration, result.held_out)
    ]
    assert len(runs[0]) == samples * 69
    assert not runs[0] & runs[1]


@pytest.mark.parametrize("seed", range(5))
def test_whole_documents_go_to_one_part_where_there_are_enough(seed):
    documents = _unique_documents([300] * 12)
    result = make_samples(documents, PLAIN, samples=6, tokens=128, held_out=3, seed=seed)
    names = [
        {name for sample in part for name in sample.name.split(" + ")} for part in (result.calibration, result.held_out)
    ]
    assert not names[0] & names[1]


def test_blocks_come_from_as_many_documents_as_there_are():
    documents = _unique_documents([2000] * 8)
    result = make_samples(documents, PLAIN, samples=6, tokens=64, held_out=2)
    assert len({sample.name for sample in _all(result)}) == 8


def test_one_long_document_is_sampled_all_over():
    (document,) = _unique_documents([28_000])
    result = make_samples([document], PLAIN, samples=12, tokens=64, held_out=4)
    starts = sorted(sample.context[0].item() for sample in _all(result))
    assert starts[0] < 7_000
    assert starts[-1] > 21_000
    assert max(after - before for before, after in pairwise(starts)) < 7_000


def test_short_documents_are_joined_by_a_blank_line():
    documents = [Document(f"entry {number:02}.", "text", f"d{number}") for number in range(40)]
    result = make_samples(documents, BYTES, samples=2, tokens=64, held_out=1)
    for sample in _all(result):
        text = BYTES.decode(sample.context)
        parts = text.split("\n\n")
        assert len(parts) >= 5
        assert all(re.fullmatch(r"entry \d\d\.", part) for part in parts[:-1])
        named = [f"entry {int(name[1:]):02}." for name in sample.name.split(" + ")]
        assert "\n\n".join(named).startswith(text)


def test_the_same_text_twice_counts_once():
    (document,) = _unique_documents([150])
    copies = [Document(document.text, "text", f"copy {number}") for number in range(4)]
    with pytest.raises(KVProfileError, match="150 tokens found, 200 needed"):
        make_samples(copies, PLAIN, samples=1, tokens=100, held_out=1)


def test_a_seed_gives_the_same_blocks_and_another_seed_others():
    documents = _unique_documents([900] * 20)
    results = [
        make_samples(documents, PLAIN, samples=5, tokens=64, held_out=2, continuation=8, seed=seed)
        for seed in (0, 0, 1, 2)
    ]
    first, again, *others = results
    assert first.digest == again.digest
    assert first.description == again.description
    assert all(torch.equal(a.context, b.context) for a, b in zip(_all(first), _all(again), strict=True))
    assert len({result.digest for result in results}) == 3
    for other in others:
        assert {s.context[0].item() for s in _all(first)} != {s.context[0].item() for s in _all(other)}


def test_the_digest_covers_every_id_in_order():
    documents = _unique_documents([900] * 6)
    result = make_samples(documents, PLAIN, samples=3, tokens=64, held_out=2, continuation=5)
    ids = [word for sample in _all(result) for word in _ids(sample)]
    assert result.digest == hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
    assert result.digest != make_samples(documents, PLAIN, samples=3, tokens=64, held_out=2, continuation=6).digest


def test_bos_is_added_only_where_the_tokenizer_adds_it():
    documents = _unique_documents([900] * 4)
    with_bos = make_samples(documents, TOKENIZERS[True, False], samples=2, tokens=64, held_out=0)
    assert all(sample.context[0] == BOS and len(sample.context) == 64 for sample in with_bos.calibration)

    silent = _word_tokenizer()
    silent.bos_token = "[BOS]"
    without = make_samples(documents, silent, samples=2, tokens=64, held_out=0)
    assert silent.bos_token_id == BOS
    assert all(BOS not in sample.context for sample in without.calibration)


def test_special_tokens_of_the_end_are_not_added():
    tokenizer = _word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [BOS]", special_tokens=[("[BOS]", BOS)]
    )
    result = make_samples(_unique_documents([40] * 20), tokenizer, samples=2, tokens=100, held_out=1)
    assert all(BOS not in sample.context for sample in _all(result))


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 8, 16, 21])
def test_every_prefix_is_near_the_built_in_shares(samples):
    sizes = [900] * 30
    documents = _unique_documents(sizes, kinds=("encyclopedia", "prose", "code"))
    result = make_samples(documents, PLAIN, samples=samples, tokens=64, held_out=2)
    shares = {"prose": 3 / 8, "code": 3 / 8, "encyclopedia": 2 / 8}
    for size in range(1, samples + 1):
        counts = Counter(sample.kind for sample in result.calibration[:size])
        assert all(abs(counts[kind] - share * size) < 1 for kind, share in shares.items())
    if samples >= 3:
        assert {sample.kind for sample in result.calibration} == set(shares)
    if samples % 8 == 0:
        assert Counter(s.kind for s in result.calibration) == {kind: share * samples for kind, share in shares.items()}


def test_each_sample_is_of_one_kind():
    documents = _unique_documents([30] * 300, kinds=("prose", "code", "encyclopedia"))
    kinds = {document.name: document.kind for document in documents}
    for sample in _all(make_samples(documents, PLAIN, samples=8, tokens=64, held_out=3)):
        assert {kinds[name] for name in sample.name.split(" + ")} == {sample.kind}


def test_other_kinds_come_in_proportion_to_their_text():
    documents = _unique_documents([6000, 2000], kinds=("novels", "letters"))
    result = make_samples(documents, PLAIN, samples=8, tokens=64, held_out=4)
    assert Counter(sample.kind for sample in result.calibration) == {"novels": 6, "letters": 2}
    assert Counter(sample.kind for sample in result.held_out) == {"novels": 3, "letters": 1}
    assert "novels 6+3, letters 2+1" in result.description


def test_a_kind_does_not_move_the_blocks_of_another():
    novels = _unique_documents([6000])
    letters = [Document("some other words " * 20, "letters", "l")]
    alone = make_samples(novels, PLAIN, samples=4, tokens=64, held_out=1)
    beside = make_samples(novels + letters, PLAIN, samples=4, tokens=64, held_out=1)
    assert alone.digest == beside.digest


def test_no_more_text_is_tokenized_than_needed():
    (document,) = _unique_documents([29_000])
    book = Document("\n".join([document.text] * 40), "text", "a long book")
    tokenizer = Counting(PLAIN)
    make_samples([book], tokenizer, samples=4, tokens=64, held_out=1)
    assert len(book.text) > 7_000_000
    assert tokenizer.characters < 5 * 64 * 50


def test_a_text_longer_than_the_model_raises_no_warning():
    tokenizer = _word_tokenizer()
    make_samples(_unique_documents([900] * 4), tokenizer, samples=2, tokens=64, held_out=1)
    assert tokenizer.deprecation_warnings == {}
    tokenizer("w2 " * 100)  # what the check would see
    assert tokenizer.deprecation_warnings != {}


def test_too_little_text_says_what_to_do():
    documents = _unique_documents([1200])
    with pytest.raises(KVProfileError) as caught:
        make_samples(documents, PLAIN, samples=10, tokens=128, held_out=2)
    assert str(caught.value) == (
        "too little text of kind 'text': 1,200 tokens found, 1,536 needed (10 samples and 2 held out of 128), 336 missing; "
        "ask for fewer --samples or fewer --tokens, or give more text with --data"
    )


@pytest.mark.parametrize("documents", [[], [Document(" \n", "text", "blank")]])
def test_no_text_at_all(documents):
    with pytest.raises(KVProfileError, match="the text is empty"):
        make_samples(documents, PLAIN, samples=1, tokens=64, held_out=0)


@pytest.mark.parametrize(
    ("option", "value"), [("samples", 0), ("samples", -3), ("tokens", 63), ("held_out", -1), ("continuation", -1)]
)
def test_senseless_numbers_are_usage_errors(option, value):
    options = {"samples": 1, "tokens": 64, "held_out": 0, "continuation": 0} | {option: value}
    with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')} is {value}, expected at least"):
        make_samples(_unique_documents([900]), PLAIN, **options)


def test_the_built_in_text_shares_nothing_between_the_parts():
    result = make_samples(load_documents(), BYTES, samples=8, tokens=6000, held_out=4)
    learned, checked = (
        [BYTES.decode(sample.context) for sample in part] for part in (result.calibration, result.held_out)
    )
    runs = {text[start : start + 150] for text in learned for start in range(len(text) - 149)}
    assert len(runs) > 40_000
    for text in checked:
        shared = [text[start : start + 150] for start in range(len(text) - 149) if text[start : start + 150] in runs]
        assert shared == []


def test_encyclopedia_entries_keep_their_answers():
    made = entries(0, 60)
    documents = [Document(entry.text, "encyclopedia", entry.title) for entry in made]
    facts = {entry.title: entry.facts for entry in made}
    for sample in make_samples(documents, BYTES, samples=4, tokens=4000, held_out=1).calibration:
        text = BYTES.decode(sample.context)
        for title in sample.name.split(" + ")[:-1]:  # the last one is cut off
            assert all(answer in text for _, answer in facts[title])
