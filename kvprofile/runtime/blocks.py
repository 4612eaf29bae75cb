"""How a layer stores its slots: in blocks of one size, each of one head, so that one product serves all heads.

Heads keep different numbers of slots. Blocks make them alike (as in PagedAttention, arXiv 2309.06180) without padding every
head to the longest: only a head's last block has room to spare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# What is added to the logits of room without a slot. Finite, so that a query that sees nothing makes no NaN.
MASKED = -1e30


@dataclass
class Blocks:
    """Slots in blocks: head (b, h) owns as many consecutive ones as its `lengths[b * kv_heads + h]` slots need.

    keys, values: the parts in which they are stored, each `(blocks, size, width)`; unused room is zero. bias `(blocks, size)`:
    what is added to a slot's logits, `MASKED` where there is none, or the dtype's least number; None if all slots' are zero.
    owner `(blocks,)`: every block's head. filled `(blocks,)` int32: slots in every block, at least one. held `(heads,)` int32:
    the lengths; ends `(heads + 1,)` int32: slots that the blocks before a head have room for, and at last all. All lie on the
    device, where every step reads them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    owner: Tensor
    filled: Tensor
    held: Tensor
    ends: Tensor
    lengths: list[int]

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        bias = [] if self.bias is None else [self.bias]
        return [*self.keys, *self.values, *bias, self.owner, self.filled, self.held, self.ends]

    @property
    def size(self) -> int:
        """Slots of a block."""
        return self.keys[0].shape[1]

    def counts(self) -> Tensor:
        """Blocks of every head, on the CPU."""
        return _counts(torch.tensor(self.lengths), self.size)


@dataclass(frozen=True)
class Stored:
    """Slots as they are stored, head by head: parts `(slots, width)`, bias `(slots,)` or None, and the slots of every head."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    lengths: list[int]


def empty_blocks(like: Stored, heads: int, size: int) -> Blocks:
    """No slots of `heads` heads, in blocks of `size`, of the widths, dtypes and device of `like`."""

    def no(part: Tensor) -> Tensor:
        return part.new_empty(0, size, *part.shape[1:])

    facts = _sent(torch.zeros(heads, dtype=torch.long), size, like.keys[0].device)
    keys, values = (tuple(map(no, parts)) for parts in (like.keys, like.values))
    return Blocks(keys, values, None if like.bias is None else no(like.bias), *facts, [0] * heads)


def append(old: Blocks, new: Stored, heads: list[int]) -> Blocks:
    """Put new slots behind the old ones of the heads they belong to: `new.lengths[i]` slots are head `heads[i]`'s."""
    before, added, owners = (torch.tensor(part, dtype=torch.long) for part in (old.lengths, new.lengths, heads))
    after = before.index_add(0, owners, added)
    counts = _counts(after, old.size)
    first = _first(counts)
    earlier = old.counts()
    stay = torch.arange(len(old.owner)) + (first - _first(earlier)).repeat_interleave(earlier)
    come = (first * old.size + before)[owners] - _first(added)
    place = torch.arange(int(added.sum())) + come.repeat_interleave(added)
    total, device = int(counts.sum()), old.owner.device
    stay, place = (index.to(device, non_blocking=True) for index in (stay, place))

    def grown(stored: Tensor, coming: Tensor, fill: float = 0.0) -> Tensor:
        blocks = stored.new_full((total, *stored.shape[1:]), fill)
        blocks.index_copy_(0, stay, stored)
        blocks.flatten(0, 1).index_copy_(0, place, coming)
        return blocks

    keys, values = (
        tuple(grown(*pair) for pair in zip(*parts, strict=True))
        for parts in ((old.keys, new.keys), (old.values, new.values))
    )
    bias = None
    if old.bias is not None and new.bias is not None:
        bias = grown(old.bias, new.bias, max(MASKED, torch.finfo(old.bias.dtype).min))
    return Blocks(keys, values, bias, *_sent(after, old.size, device), after.tolist())


def select_rows(blocks: Blocks, rows: list[int], kv_heads: int) -> Blocks:
    """Take the slots of the batch rows `rows`, in that order."""
    heads = torch.tensor([row * kv_heads + head for row in rows for head in range(kv_heads)])
    counts = blocks.counts()
    taken = counts[heads]
    begin = _first(counts)[heads] - _first(taken)
    index = torch.arange(int(taken.sum())) + begin.repeat_interleave(taken)
    index = index.to(blocks.owner.device, non_blocking=True)
    lengths = [blocks.lengths[head] for head in heads]
    facts = _sent(torch.tensor(lengths), blocks.size, blocks.owner.device)
    bias = None if blocks.bias is None else blocks.bias[index]
    keys, values = (tuple(part[index] for part in parts) for parts in (blocks.keys, blocks.values))
    return Blocks(keys, values, bias, *facts, lengths)


def _counts(lengths: Tensor, size: int) -> Tensor:
    return (lengths + size - 1) // size


def _sent(lengths: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`owner`, `filled`, `held` and `ends` of heads of such lengths on the device; the host does not wait for the copies."""
    counts = _counts(lengths, size)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    before = (torch.arange(len(owner)) - _first(counts).repeat_interleave(counts)) * size
    filled = (lengths.repeat_interleave(counts) - before).clamp(max=size)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0) * size])
    facts = torch.cat([filled, lengths, ends]).int().to(device, non_blocking=True)
    return owner.to(device, non_blocking=True), *facts.split([len(owner), len(lengths), len(ends)])


def _first(counts: Tensor) -> Tensor:
    """Where every head begins."""
    return counts.cumsum(0) - counts
