"""How a layer stores its slots: in blocks of one size, each of one head, so that one product serves all heads.

Heads keep different numbers of slots. Blocks make them alike (as in PagedAttention, arXiv 2309.06180) without padding every
head to the longest: only a head's last block has room to spare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.slots import Slots

SMALLEST, LARGEST = 16, 128  # slots of a block
# What is added to the logits of room without a slot. Finite, so that a query that sees nothing makes no NaN.
MASKED = -1e30


def block_size(tokens: int) -> int:
    """Slots of a block for a text of so many tokens: large ones are faster to read, and half a block per head is empty.

    A power of two, so that on average the empty room of a head is less than 1% of the tokens.
    """
    return 1 << (min(max(tokens // 64, SMALLEST), LARGEST).bit_length() - 1)


@dataclass
class Blocks:
    """Slots in blocks: head (b, h) owns as many consecutive ones as its `lengths[b * kv_heads + h]` slots need.

    keys `(blocks, size, head_dim)`, values `(blocks, size, value_dim)`, bias `(blocks, size)` float32: what is added to a
    slot's logits, `MASKED` where there is none. What lies in unused room has no meaning but is finite. owner `(blocks,)`:
    every block's head. held `(heads,)` int32: the lengths; ends `(heads + 1,)` int32: slots that the blocks before a head have
    room for, and at last all. Both lie with the blocks, where every step reads them.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    owner: Tensor
    held: Tensor
    ends: Tensor
    lengths: list[int]

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [self.keys, self.values, self.bias, self.owner, self.held, self.ends]

    @property
    def size(self) -> int:
        """Slots of a block."""
        return self.keys.shape[1]

    def counts(self) -> Tensor:
        """Blocks of every head, on the CPU."""
        return _counts(torch.tensor(self.lengths), self.size)


def empty_blocks(like: Slots, heads: int, size: int) -> Blocks:
    """No slots of `heads` heads, in blocks of `size`, of the dtype, dimensions and device of `like`."""

    def no(part: Tensor) -> Tensor:
        return part.new_empty(0, size, *part.shape[1:])

    owner, held, ends = _sent(torch.zeros(heads, dtype=torch.long), size, like.keys.device)
    return Blocks(no(like.keys), no(like.values), no(like.bias), owner, held, ends, [0] * heads)


def append(old: Blocks, new: Slots, heads: list[int]) -> Blocks:
    """Put new slots behind the old ones of the heads they belong to: `new.lengths[i]` slots are head `heads[i]`'s."""
    before, added, owners = (torch.tensor(part, dtype=torch.long) for part in (old.lengths, new.lengths, heads))
    after = before.index_add(0, owners, added)
    counts = _counts(after, old.size)
    first = _first(counts)
    earlier = old.counts()
    stay = torch.arange(len(old.keys)) + (first - _first(earlier)).repeat_interleave(earlier)
    come = (first * old.size + before)[owners] - _first(added)
    place = torch.arange(int(added.sum())) + come.repeat_interleave(added)
    total = int(counts.sum())
    stay, place = (index.to(old.keys.device, non_blocking=True) for index in (stay, place))

    def grown(stored: Tensor, coming: Tensor, fill: float) -> Tensor:
        blocks = stored.new_full((total, *stored.shape[1:]), fill)
        blocks.index_copy_(0, stay, stored)
        blocks.flatten(0, 1).index_copy_(0, place, coming)
        return blocks

    return Blocks(
        grown(old.keys, new.keys, 0.0),
        grown(old.values, new.values, 0.0),
        grown(old.bias, new.bias, MASKED),
        *_sent(after, old.size, old.keys.device),
        after.tolist(),
    )


def select_rows(blocks: Blocks, rows: list[int], kv_heads: int) -> Blocks:
    """Take the slots of the batch rows `rows`, in that order."""
    heads = torch.tensor([row * kv_heads + head for row in rows for head in range(kv_heads)])
    counts = blocks.counts()
    taken = counts[heads]
    begin = _first(counts)[heads] - _first(taken)
    index = torch.arange(int(taken.sum())) + begin.repeat_interleave(taken)
    index = index.to(blocks.keys.device, non_blocking=True)
    lengths = [blocks.lengths[head] for head in heads]
    facts = _sent(torch.tensor(lengths), blocks.size, blocks.keys.device)
    return Blocks(blocks.keys[index], blocks.values[index], blocks.bias[index], *facts, lengths)


def _counts(lengths: Tensor, size: int) -> Tensor:
    return (lengths + size - 1) // size


def _sent(lengths: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`owner`, `held` and `ends` of heads of such lengths on the device; the host does not wait for the copies."""
    counts = _counts(lengths, size)
    owner = torch.arange(len(counts)).repeat_interleave(counts).to(device, non_blocking=True)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0) * size])
    held, ends = torch.cat([lengths, ends]).int().to(device, non_blocking=True).split([len(lengths), len(ends)])
    return owner, held, ends


def _first(counts: Tensor) -> Tensor:
    """Where every head begins."""
    return counts.cumsum(0) - counts
