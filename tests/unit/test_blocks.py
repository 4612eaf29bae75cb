"""Blocks of slots against plain lists: what is appended and selected is there, in order, and nothing else counts."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvprofile.runtime.block_size import LARGEST, SMALLEST, block_size
from kvprofile.runtime.blocks import (
    MASKED,
    Blocks,
    Stored,
    append,
    empty_blocks,
    select_rows,
)
from tests.unit.reference import PROPERTY

HEADS, SIZE = 6, 16


def slots_of(heads):
    """Slots of plain lists: `heads[head]` is a list of numbers, one for each slot."""
    flat = torch.tensor([number for head in heads for number in head], dtype=torch.float32)
    keys = torch.stack([flat, -flat], dim=-1), (flat[:, None] + 100).to(torch.uint8)
    return Stored(keys, (flat[:, None] + 0.5,), flat * 2, [len(head) for head in heads])


def lists_of(blocks: Blocks):
    """The same numbers, found through the blocks' owners alone; all that is no slot is masked."""
    assert [part.shape for part in blocks.keys] == [(len(blocks.owner), SIZE, 2), (len(blocks.owner), SIZE, 1)]
    assert [part.shape for part in blocks.values] == [(len(blocks.owner), SIZE, 1)]
    places = torch.arange(SIZE) < blocks.filled[:, None]
    assert torch.equal(places, blocks.bias != MASKED)
    assert bool(places[:, 0].all())
    assert blocks.owner.tolist() == sorted(blocks.owner.tolist())
    heads = []
    for head, length in enumerate(blocks.lengths):
        own = blocks.owner == head
        assert int(own.sum()) == -(-length // SIZE)
        parts = (*blocks.keys, *blocks.values, blocks.bias)
        keys, codes, values, bias = (part[own].flatten(0, 1) for part in parts)
        assert bool((bias[length:] == MASKED).all())
        assert bool(keys.isfinite().all() and values.isfinite().all())
        numbers = keys[:length, 0]
        assert torch.equal(keys[:length, 1], -numbers)
        assert torch.equal(codes[:length, 0], (numbers + 100).to(torch.uint8))
        assert torch.equal(values[:length, 0], numbers + 0.5)
        assert torch.equal(bias[:length], numbers * 2)
        heads.append(numbers.tolist())
    return heads


def stored(heads):
    slots = slots_of(heads)
    return append(empty_blocks(slots, HEADS, SIZE), slots, list(range(HEADS)))


number = st.integers(-99, 99).map(float)
# Shorter than a block, a little longer, and exactly as long.
some = st.one_of(
    st.lists(number, max_size=4),
    st.integers(SIZE - 2, 2 * SIZE + 1).map(lambda length: [float(place) for place in range(length)]),
)
ragged = st.lists(some, min_size=HEADS, max_size=HEADS)


@PROPERTY
@given(old=ragged, new=ragged)
def test_new_slots_come_behind_the_old_of_every_head(old, new):
    joined = append(stored(old), slots_of(new), list(range(HEADS)))
    assert lists_of(joined) == [first + second for first, second in zip(old, new, strict=True)]


@PROPERTY
@given(old=ragged, new=ragged, heads=st.permutations(range(HEADS)), some=st.integers(0, HEADS))
def test_new_slots_find_the_heads_they_are_for(old, new, heads, some):
    heads = heads[:some]
    joined = append(stored(old), slots_of([new[head] for head in heads]), heads)
    assert lists_of(joined) == [old[head] + (new[head] if head in heads else []) for head in range(HEADS)]


@PROPERTY
@given(heads=ragged, rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_select_takes_whole_batch_rows(heads, rows):
    chosen = select_rows(stored(heads), rows, kv_heads=2)
    assert lists_of(chosen) == [heads[row * 2 + head] for row in rows for head in range(2)]


def test_what_was_appended_to_stays_as_it_was():
    old = stored([[1.0, 2.0]] * HEADS)
    append(old, slots_of([[3.0]] * HEADS), list(range(HEADS)))
    assert lists_of(old) == [[1.0, 2.0]] * HEADS


@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (1024, 16), (2047, 16), (2048, 32), (8191, 64), (10**6, 128)])
def test_blocks_grow_with_the_text(tokens, size):
    assert block_size(tokens) == size
    assert SMALLEST <= size <= LARGEST
