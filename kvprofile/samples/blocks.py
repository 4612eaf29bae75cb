"""Documents become token blocks: so many for calibration, so many held out, none sharing text with another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.samples.builtin import SHARES
from kvprofile.samples.cutting import Block, cut_parts
from kvprofile.samples.documents import Document

if TYPE_CHECKING:
    import torch

MIN_TOKENS = 64
"""A shorter context has no old tokens to merge: protected and recent tokens fill it."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One block of tokens of one kind of text, with the tokens that follow it.

    Attributes:
        context: `(tokens,)` int64, what is prefilled and compressed. Starts with BOS where the tokenizer adds one.
        continuation: `(continuation,)` int64, the tokens that come next in the same text; may be empty.
        kind: the kind of the documents the block was cut from.
        name: their names, joined by " + ".
    """

    context: torch.Tensor
    continuation: torch.Tensor
    kind: str
    name: str


@dataclass(frozen=True, eq=False)
class SampleSet:
    """The samples a calibration uses: one part to learn from, one to check on.

    Attributes:
        calibration: the samples to learn from; kinds are interleaved, so any prefix has about the same mix.
        held_out: samples cut from other text, for the check.
        description: one line for the record.
        digest: SHA-256 over all token ids as little-endian int64, calibration first, each context before its
            continuation.
    """

    calibration: list[Sample]
    held_out: list[Sample]
    description: str
    digest: str


def make_samples(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    samples: int,
    tokens: int,
    held_out: int,
    continuation: int = 0,
    seed: int = 0,
) -> SampleSet:
    """Cut documents into `samples` calibration and `held_out` other blocks of `tokens` + `continuation` ids each.

    Every block is of one kind. The built-in kinds come in their documented shares (3 prose, 3 code, 2 encyclopedia);
    any other mix follows the amount of text of each kind. Documents with identical text count once. Where they
    suffice, whole documents go to one part or the other; else each is cut into disjoint regions. No block overlaps
    another, nothing is repeated. Documents shorter than a block are joined by a blank line. The same documents,
    tokenizer and seed give the same blocks. What is not noticed is a passage that one document quotes from another.

    Raises:
        UsageError: a number that makes no sense (`samples` < 1, `tokens` < 64, a negative count).
        KVProfileError: there is too little text; the message says how much is missing.
    """
    _check(samples=samples, tokens=tokens, held_out=held_out, continuation=continuation)
    by_kind = _group(documents)
    first = _first_token(tokenizer)
    length = tokens - len(first) + continuation

    order, held_out_order = _interleave(by_kind, samples), _interleave(by_kind, held_out)
    needs = {kind: (order.count(kind), held_out_order.count(kind)) for kind in by_kind}
    encode = _encoder(tokenizer)
    calibration: dict[str, Iterator[Block]] = {}
    check: dict[str, Iterator[Block]] = {}
    for kind, group in by_kind.items():
        # A generator of its own for each kind: adding one kind does not move the blocks of another.
        parts = cut_parts(group, needs[kind], length, encode, random.Random(f"{seed}/{kind}"))
        calibration[kind], check[kind] = map(iter, parts)
    learn = [_sample(next(calibration[kind]), kind, first, tokens) for kind in order]
    verify = [_sample(next(check[kind]), kind, first, tokens) for kind in held_out_order]

    mix = ", ".join(f"{kind} {mine}+{theirs}" for kind, (mine, theirs) in needs.items() if mine + theirs)
    description = (
        f"{samples} samples of {tokens:,} tokens and {held_out} held out, "
        f"continuation {continuation}, seed {seed}: {mix}"
    )
    return SampleSet(learn, verify, description, _digest(learn + verify))


def _check(*, samples: int, tokens: int, held_out: int, continuation: int) -> None:
    for name, value, least in (
        ("samples", samples, 1),
        ("tokens", tokens, MIN_TOKENS),
        ("held-out", held_out, 0),
        ("continuation", continuation, 0),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}, expected at least {least}")


def _group(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """The documents by kind, in order, without empty ones and without the same text twice (which would leak)."""
    by_kind: dict[str, list[Document]] = {}
    seen: set[str] = set()
    for document in documents:
        if document.text in seen or not document.text.strip():
            continue
        seen.add(document.text)
        by_kind.setdefault(document.kind, []).append(document)
    if not by_kind:
        raise KVProfileError("the text is empty: no document with any words in it; give other text with --data")
    return by_kind


def _interleave(by_kind: dict[str, list[Document]], count: int) -> list[str]:
    """`count` kinds in an order of which every prefix is near the shares: Sainte-Laguë's rule, ties to the first."""
    if by_kind.keys() == SHARES.keys():
        weights: dict[str, int] = SHARES
    else:
        weights = {kind: sum(len(document.text) for document in group) for kind, group in by_kind.items()}
    dealt = dict.fromkeys(weights, 0)
    order = []
    for _ in range(count):
        kind = max(weights, key=lambda kind: weights[kind] / (2 * dealt[kind] + 1))
        dealt[kind] += 1
        order.append(kind)
    return order


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        # verbose=False: a text longer than the model's window is no mistake here, it is cut into blocks.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def _first_token(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it in front by itself: then the model expects it there."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("x")["input_ids"]
    return [bos] if bos is not None and len(ids) > 0 and ids[0] == bos else []


def _sample(block: Block, kind: str, first: list[int], tokens: int) -> Sample:
    import torch

    ids = torch.tensor(first + block.ids, dtype=torch.long)
    return Sample(ids[:tokens].clone(), ids[tokens:].clone(), kind, " + ".join(block.names))


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for ids in (sample.context, sample.continuation):
            digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
