"""One kind's documents are cut into disjoint blocks of token ids, reading no more text than needed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from kvprofile.errors import KVProfileError
from kvprofile.samples.documents import Document

CHARACTERS_PER_TOKEN = 8
"""Text read for each token wanted. Subword tokenizers need 1 to 5; where this is too little, the text is read on."""

MAX_REACH = 1000
"""Characters within which the end of a line or a word is looked for, where a text is cut."""

SEPARATOR = "\n\n"

Encode = Callable[[str], list[int]]


class Block(NamedTuple):
    """Consecutive token ids of one part, and the documents they were cut from."""

    ids: list[int]
    names: list[str]


def cut_parts(
    documents: list[Document], needs: tuple[int, int], length: int, encode: Encode, rng: random.Random
) -> tuple[list[Block], list[Block]]:
    """Cut `needs` = (calibration, held out) blocks of `length` ids from documents of one kind, none sharing text.

    Three ways are tried: whole documents dealt to the two parts, every document cut in proportion to the needs, and
    all tokens in one row, which fails only when there are fewer tokens than asked for.

    Raises:
        KVProfileError: there are fewer tokens than asked for.
    """
    documents = _shuffled(documents, rng)
    for split in (_deal, _divide):
        parts = split(documents, needs)
        calibration, held_out = (
            _fill(part, need, length, encode, rng) for part, need in zip(parts, needs, strict=True)
        )
        if (len(calibration), len(held_out)) == needs:
            return calibration, held_out
    blocks, rest = _consecutive(documents, sum(needs), length, encode)
    if len(blocks) < sum(needs):
        raise _too_little(documents[0].kind, len(blocks) * length + rest, needs, length)
    return blocks[: needs[0]], blocks[needs[0] :]


def _too_little(kind: str, found: int, needs: tuple[int, int], length: int) -> KVProfileError:
    needed = sum(needs) * length
    return KVProfileError(
        f"too little text of kind {kind!r}: {found:,} tokens found, {needed:,} needed ({needs[0]} samples and {needs[1]} "
        f"held out of {length:,}), {needed - found:,} missing; ask for fewer --samples or fewer --tokens, or give more "
        "text with --data"
    )


def _shuffled(documents: list[Document], rng: random.Random) -> list[Document]:
    """A new order, from `random()` alone: the one method Python promises to keep the same for a seed."""
    return sorted(documents, key=lambda _: rng.random())


def _deal(documents: list[Document], needs: tuple[int, int]) -> list[list[Document]]:
    """Whole documents: each goes to the part that has the fewest characters for its need."""
    parts: list[list[Document]] = [[] for _ in needs]
    wanting = [part for part, need in enumerate(needs) if need]
    characters = [0] * len(needs)
    for document in documents if wanting else []:
        part = min(wanting, key=lambda part: characters[part] / needs[part])
        parts[part].append(document)
        characters[part] += len(document.text)
    return parts


def _divide(documents: list[Document], needs: tuple[int, int]) -> list[list[Document]]:
    """Every document cut into one region for each part, as long as its need."""
    parts: list[list[Document]] = [[] for _ in needs]
    for document in documents:
        start, done = 0, 0
        for part, need in enumerate(needs):
            done += need
            end = _break_after(document.text, len(document.text) * done // max(sum(needs), 1), MAX_REACH)
            region = document.text[start:end]
            if region.strip():
                parts[part].append(replace(document, text=region))
            start = end
    return parts


def _fill(documents: list[Document], need: int, length: int, encode: Encode, rng: random.Random) -> list[Block]:
    """Up to `need` blocks: from as many places as possible, else one after the other."""
    width = CHARACTERS_PER_TOKEN * length
    blocks = _scattered(_shuffled(_spread(documents, need, width), rng), need, length, encode, rng)
    if len(blocks) < need:
        blocks, _ = _consecutive(documents, need, length, encode)
    return blocks


def _spread(documents: list[Document], places: int, width: int) -> list[Document]:
    """Halve the longest documents until `places` of them hold a block each, or none can be halved."""
    order = count()
    heap = [(-len(document.text), next(order), document) for document in documents]
    heapq.heapify(heap)
    long = sum(len(document.text) >= width for document in documents)
    while heap and long < places and -heap[0][0] >= 2 * width:
        _, _, longest = heapq.heappop(heap)
        middle = _break_after(longest.text, len(longest.text) // 2, _reach(width))
        halves = [replace(longest, text=text) for text in (longest.text[:middle], longest.text[middle:])]
        for half in halves:
            heapq.heappush(heap, (-len(half.text), next(order), half))
        long += sum(len(half.text) >= width for half in halves) - 1
    return [document for _, _, document in sorted(heap, key=lambda item: item[1])]


def _scattered(documents: list[Document], need: int, length: int, encode: Encode, rng: random.Random) -> list[Block]:
    """At most one block from every long document, from anywhere in it; short ones are joined, each block anew."""
    width = CHARACTERS_PER_TOKEN * length
    blocks: list[Block] = []
    joined = Block([], [])
    for document in documents:
        if len(blocks) == need:
            break
        if len(document.text) >= width:
            start = int(rng.random() * (len(document.text) - width + 1))
            start = _break_after(document.text, start, _reach(width)) if start else 0
            ids = encode(document.text[start : _break_after(document.text, start + width, _reach(width))])
            if len(ids) >= length:
                blocks.append(Block(ids[:length], [document.name]))
            continue
        joined.names.append(document.name)
        joined.ids.extend(encode(SEPARATOR + document.text if joined.ids else document.text))
        if len(joined.ids) >= length:
            blocks.append(Block(joined.ids[:length], joined.names))
            joined = Block([], [])
    return blocks


def _consecutive(documents: list[Document], need: int, length: int, encode: Encode) -> tuple[list[Block], int]:
    """Up to `need` blocks one after the other through all the documents, and the number of ids left over."""
    blocks: list[Block] = []
    ids: list[int] = []
    names: list[str] = []
    for document in documents:
        names = [*names, document.name] if ids else [document.name]
        text = SEPARATOR + document.text if ids else document.text
        for piece in _pieces(text, CHARACTERS_PER_TOKEN * length):
            if len(blocks) == need:
                return blocks, len(ids)
            ids = ids + encode(piece)
            while len(ids) >= length and len(blocks) < need:
                blocks.append(Block(ids[:length], names))
                ids, names = ids[length:], [document.name]
    return blocks, len(ids)


def _pieces(text: str, width: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = _break_after(text, start + width, _reach(width))
        yield text[start:end]
        start = end


def _break_after(text: str, position: int, reach: int) -> int:
    """The first place from `position` on where a line ends, else a word, else the text, else `position` itself."""
    for mark in ("\n", " "):
        found = text.find(mark, position, position + reach)
        if found >= 0:
            return found + 1
    return len(text) if position + reach >= len(text) else position


def _reach(width: int) -> int:
    """How far to look for a break between pieces of `width` characters: never so far that a piece is left empty."""
    return min(width // 4, MAX_REACH)
