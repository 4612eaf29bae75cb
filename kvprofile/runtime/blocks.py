"""How a layer stores its slots: in blocks of one size, each of one head, so that one product serves all heads.

Heads keep different numbers of slots. Blocks make them alike (as in PagedAttention, arXiv 2309.06180) without padding every
head to the longest: a head's last block has room to spare, and, once the text has grown, a 64th of its slots on top, so that
new slots are written beside the old ones and nothing that is stored is touched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# What is added to the logits of room without a slot. Finite, so that a query that sees nothing makes no NaN.
MASKED = -1e30
SLACK = 64  # a head that has outgrown its room gets so much of its slots as more: one in 64


@dataclass
class Blocks:
    """Slots in blocks: head (b, h) owns `rooms[b * kv_heads + h]` consecutive ones, and fills the first of them.

    keys, values: the parts in which they are stored, each `(blocks, size, width)`; unused room is zero. bias `(blocks, size)`:
    what is added to a slot's logits, `MASKED` where there is none, or the dtype's least number; None if all slots' are zero.
    owner `(blocks,)`: every block's head. counts int32: `filled`, `held` and `ends`, one after the other. All lie on the
    device, where every step reads them, and stay where they are until a head has outgrown its room; then each of these tensors
    is a new one. lengths: slots of every head.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    owner: Tensor
    counts: Tensor
    lengths: list[int]
    rooms: list[int]

    @property
    def filled(self) -> Tensor:
        """Slots in every block, `(blocks,)`: none in blocks that wait for some."""
        return self.counts[: len(self.owner)]

    @property
    def held(self) -> Tensor:
        """Slots of every head, `(heads,)`."""
        return self.counts[len(self.owner) :][: len(self.lengths)]

    @property
    def ends(self) -> Tensor:
        """Slots that the blocks before every head have room for, and at last all, `(heads + 1,)`."""
        return self.counts[len(self.owner) + len(self.lengths) :]

    def parts(self) -> list[Tensor]:
        """What is stored of the slots."""
        return [*self.keys, *self.values, *([] if self.bias is None else [self.bias])]

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [*self.parts(), self.owner, self.counts]

    @property
    def size(self) -> int:
        """Slots of a block."""
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Stored:
    """Slots as they are stored, head by head: parts `(slots, width)`, bias `(slots,)` or None, and the slots of every head."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    lengths: list[int]

    def parts(self) -> list[Tensor]:
        """In the order of `Blocks.parts`."""
        return [*self.keys, *self.values, *([] if self.bias is None else [self.bias])]


def empty_blocks(like: Stored, heads: int, size: int) -> Blocks:
    """No slots of `heads` heads, in blocks of `size`, of the widths, dtypes and device of `like`."""

    def no(part: Tensor) -> Tensor:
        return part.new_empty(0, size, *part.shape[1:])

    lengths = [0] * heads
    facts = _sent(lengths, lengths, size, like.keys[0].device)
    keys, values = (tuple(map(no, parts)) for parts in (like.keys, like.values))
    return Blocks(keys, values, None if like.bias is None else no(like.bias), *facts, lengths, lengths)


def append(blocks: Blocks, new: Stored, heads: list[int]) -> None:
    """Put new slots behind the old ones of the heads they belong to: `new.lengths[i]` slots are head `heads[i]`'s.

    What is stored stays where it is, unless a head has outgrown its room: then all move to where each has a little more than it
    needs, so that a slot is moved a bounded number of times, however long the text becomes.
    """
    before, added, owners = (torch.tensor(part, dtype=torch.long) for part in (blocks.lengths, new.lengths, heads))
    after = before.index_add(0, owners, added)
    needed = _blocks_for(after, blocks.size)
    # A tensor made in inference mode cannot be written to outside of it.
    stale = blocks.counts.is_inference() and not torch.is_inference_mode_enabled()
    if stale or bool((needed > torch.tensor(blocks.rooms)).any()):
        grows = before > 0  # the first slots of a head are a prompt's, and more may never come
        _move(blocks, torch.where(grows, _blocks_for(after + after // SLACK + 1, blocks.size), needed).tolist())
    rooms = torch.tensor(blocks.rooms)
    come = (_first(rooms) * blocks.size + before)[owners] - _first(added)
    place = torch.arange(int(added.sum())) + come.repeat_interleave(added)
    place = place.to(blocks.owner.device, non_blocking=True)
    for stored, coming in zip(blocks.parts(), new.parts(), strict=True):
        stored.flatten(0, 1).index_copy_(0, place, coming)
    blocks.lengths = after.tolist()
    blocks.counts.copy_(_counted(blocks.lengths, blocks.rooms, blocks.size), non_blocking=True)


def _move(blocks: Blocks, rooms: list[int]) -> None:
    """Give every head as many blocks as `rooms` says, no fewer than it has: these come first."""
    more = [new - old for new, old in zip(rooms, blocks.rooms, strict=True)]

    def moved(stored: Tensor, fill: float = 0.0) -> Tensor:
        room = stored.new_full((max(more, default=0), *stored.shape[1:]), fill)
        heads = stored.split(blocks.rooms)
        return torch.cat([part for head, count in zip(heads, more, strict=True) for part in (head, room[:count])])

    blocks.keys, blocks.values = (tuple(map(moved, parts)) for parts in (blocks.keys, blocks.values))
    if blocks.bias is not None:
        blocks.bias = moved(blocks.bias, max(MASKED, torch.finfo(blocks.bias.dtype).min))
    blocks.rooms = rooms
    blocks.owner, blocks.counts = _sent(blocks.lengths, rooms, blocks.size, blocks.owner.device)


def select_rows(blocks: Blocks, rows: list[int], kv_heads: int) -> Blocks:
    """Take the slots of the batch rows `rows`, in that order."""
    heads = [row * kv_heads + head for row in rows for head in range(kv_heads)]
    lengths, rooms = ([numbers[head] for head in heads] for numbers in (blocks.lengths, blocks.rooms))
    taken = torch.tensor(rooms)
    begin = _first(torch.tensor(blocks.rooms))[heads] - _first(taken)
    device = blocks.owner.device
    index = (torch.arange(int(taken.sum())) + begin.repeat_interleave(taken)).to(device, non_blocking=True)
    bias = None if blocks.bias is None else blocks.bias[index]
    keys, values = (tuple(part[index] for part in parts) for parts in (blocks.keys, blocks.values))
    return Blocks(keys, values, bias, *_sent(lengths, rooms, blocks.size, device), lengths, rooms)


def _blocks_for(slots: Tensor, size: int) -> Tensor:
    return (slots + size - 1) // size


def _sent(lengths: list[int], rooms: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`owner` and `counts` on the device; the host does not wait for the copies."""
    owner = torch.arange(len(rooms)).repeat_interleave(torch.tensor(rooms))
    counts = _counted(lengths, rooms, size)
    return owner.to(device, non_blocking=True), counts.to(device, non_blocking=True)


def _counted(lengths: list[int], rooms: list[int], size: int) -> Tensor:
    """`filled`, `held` and `ends` in one, on the CPU."""
    held, blocks = torch.tensor(lengths), torch.tensor(rooms)
    first = _first(blocks)
    before = (torch.arange(sum(rooms)) - first.repeat_interleave(blocks)) * size
    filled = (held.repeat_interleave(blocks) - before).clamp(0, size)
    return torch.cat([filled, held, first * size, blocks.new_tensor([sum(rooms) * size])]).int()


def _first(counts: Tensor) -> Tensor:
    """Where every head begins."""
    return counts.cumsum(0) - counts
