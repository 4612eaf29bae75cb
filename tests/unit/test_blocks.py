"""Blocks of slots against plain lists: what is appended and selected is there, in order, and nothing else counts."""

from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvprofile.runtime.block_size import LARGEST, SMALLEST, block_size
from kvprofile.runtime.blocks import MASKED, SLACK, Blocks, Stored, append, empty_blocks, select_rows
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
    assert blocks.owner.tolist() == sorted(blocks.owner.tolist())
    assert blocks.held.tolist() == blocks.lengths
    assert blocks.ends.diff().tolist() == [room * SIZE for room in blocks.rooms]
    heads = []
    for head, length in enumerate(blocks.lengths):
        own = blocks.owner == head
        assert int(own.sum()) == blocks.rooms[head] >= -(-length // SIZE)
        assert blocks.rooms[head] <= -(-(length + length // SLACK + 1) // SIZE)
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
    blocks = empty_blocks(slots, HEADS, SIZE)
    append(blocks, slots, list(range(HEADS)))
    assert blocks.rooms == [-(-len(head) // SIZE) for head in heads]  # of a prompt no more than it takes
    return blocks


number = st.integers(-99, 99).map(float)
# Shorter than a block, a little longer, and exactly as long.
some = st.one_of(
    st.lists(number, max_size=4),
    st.integers(SIZE - 2, 2 * SIZE + 1).map(lambda length: [float(place) for place in range(length)]),
)
ragged = st.lists(some, min_size=HEADS, max_size=HEADS)


@PROPERTY
@given(old=ragged, more=st.lists(ragged, max_size=4))
def test_new_slots_come_behind_the_old_of_every_head(old, more):
    blocks = stored(old)
    for new in more:
        append(blocks, slots_of(new), list(range(HEADS)))
    assert lists_of(blocks) == [list(chain(*lists)) for lists in zip(old, *more, strict=True)]


@PROPERTY
@given(old=ragged, new=ragged, heads=st.permutations(range(HEADS)), some=st.integers(0, HEADS))
def test_new_slots_find_the_heads_they_are_for(old, new, heads, some):
    heads = heads[:some]
    blocks = stored(old)
    append(blocks, slots_of([new[head] for head in heads]), heads)
    assert lists_of(blocks) == [old[head] + (new[head] if head in heads else []) for head in range(HEADS)]


@PROPERTY
@given(heads=ragged, rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_select_takes_whole_batch_rows(heads, rows):
    chosen = select_rows(stored(heads), rows, kv_heads=2)
    assert lists_of(chosen) == [heads[row * 2 + head] for row in rows for head in range(2)]


@PROPERTY
@given(old=ragged, new=ragged, rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_what_was_selected_grows_by_itself(old, new, rows):
    blocks = stored(old)
    append(blocks, slots_of(new), list(range(HEADS)))
    chosen = select_rows(blocks, rows, kv_heads=2)
    before = lists_of(chosen)
    append(blocks, slots_of([[1.0]] * HEADS), list(range(HEADS)))
    assert lists_of(chosen) == before
    append(chosen, slots_of([[2.0, 3.0]] * len(before)), list(range(len(before))))
    assert lists_of(chosen) == [[*head, 2.0, 3.0] for head in before]
    assert lists_of(blocks) == [[*first, *second, 1.0] for first, second in zip(old, new, strict=True)]


def addresses(blocks):
    return [part.data_ptr() for part in blocks.tensors()]


def test_what_is_stored_stays_where_it_is_while_there_is_room():
    """As a text grows from 500 slots a head to 5,000, a slot appended costs a bounded number of slots moved, early and late."""
    generator = torch.Generator().manual_seed(0)
    blocks = stored([[float(number) for number in range(500)]] * HEADS)
    moved, appended, empty = [0, 0], [0, 0], 0
    while sum(blocks.lengths) < HEADS * 5_000:
        late = int(sum(blocks.lengths) > HEADS * 2_750)
        before, place = sum(blocks.lengths), addresses(blocks)
        some = [[1.0] * int(torch.randint(1, 9, (), generator=generator)) for _ in range(HEADS)]
        append(blocks, slots_of(some), list(range(HEADS)))
        moved[late] += before if addresses(blocks) != place else 0
        appended[late] += sum(map(len, some))
        room, used = sum(blocks.rooms) * SIZE, sum(blocks.lengths)
        assert room <= (1 + 1 / SLACK) * used + HEADS * SIZE
        empty += int((blocks.filled == 0).sum())
    assert empty  # blocks that wait
    assert max(many / few for many, few in zip(moved, appended, strict=True)) < SLACK + HEADS
    assert 0 < moved[1] / appended[1] < 1.5 * moved[0] / appended[0]


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_blocks_made_in_inference_mode_can_be_written_to_outside_of_it(made_in_inference_mode):
    with torch.inference_mode(made_in_inference_mode):
        blocks = stored([[1.0, 2.0]] * HEADS)
        append(blocks, slots_of([[3.0]] * HEADS), list(range(HEADS)))
    append(blocks, slots_of([[4.0]] * HEADS), list(range(HEADS)))
    with torch.inference_mode():
        append(blocks, slots_of([[5.0]] * HEADS), list(range(HEADS)))
    assert lists_of(blocks) == [[1.0, 2.0, 3.0, 4.0, 5.0]] * HEADS


@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (1024, 16), (2047, 16), (2048, 32), (8191, 64), (10**6, 128)])
def test_blocks_grow_with_the_text(tokens, size):
    assert block_size(tokens) == size
    assert SMALLEST <= size <= LARGEST
