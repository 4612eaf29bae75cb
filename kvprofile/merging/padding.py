"""The slots of all heads side by side, so that one product serves them: heads with fewer are filled up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.host import sent
from kvprofile.merging.slots import Slots


@dataclass(frozen=True)
class Padded:
    """Slots as keys `(batch, kv_heads, longest, head_dim)` and values alike, float32, bias `(batch, kv_heads, longest)`.

    The bias of what is filled up is -inf. lengths `(batch, kv_heads)`. place `(slots,)`: where each slot is in a row of all.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    lengths: Tensor
    place: Tensor

    def packed(self, padded: Tensor) -> Tensor:
        """What belongs to slots of `padded` `(batch, kv_heads, longest, ...)`, in their order `(slots, ...)`."""
        return padded.flatten(0, 2).index_select(0, self.place)


def pad(slots: Slots, kv_heads: int) -> Padded:
    """Put the slots, at least one, side by side."""
    longest, device = max(slots.lengths), slots.keys.device
    held = [head * longest + slot for head, length in enumerate(slots.lengths) for slot in range(length)]
    place = sent(held, device)

    def filled(part: Tensor) -> Tensor:
        room = part.new_zeros(len(slots.lengths) * longest, *part.shape[1:])
        return room.index_copy_(0, place, part).float().unflatten(0, (-1, kv_heads, longest))

    lengths = sent(slots.lengths, device).view(-1, kv_heads)
    missing = torch.arange(longest, device=device) >= lengths[..., None]
    bias = filled(slots.bias).masked_fill(missing, -torch.inf)
    return Padded(filled(slots.keys), filled(slots.values), bias, lengths, place)
