"""The slots of a layer: what is stored for merged tokens, a different number for every head."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class Slots:
    """What is stored for the merged tokens: head (b, h) owns `lengths[b * kv_heads + h]` consecutive rows.

    keys `(slots, head_dim)`, values `(slots, value_dim)`, bias `(slots,)` float32: what is added to a slot's logits.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    lengths: list[int]

    @cached_property
    def heads(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and bias of every head, as views: made once, read at every decode step."""
        parts = (part.split(self.lengths) for part in (self.keys, self.values, self.bias))
        return list(zip(*parts, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "heads"}


def append_slots(old: Slots, new: Slots) -> Slots:
    """Put each head's new slots after its old ones."""

    def interleave(first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first.split(old.lengths), second.split(new.lengths), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])

    return Slots(
        interleave(old.keys, new.keys),
        interleave(old.values, new.values),
        interleave(old.bias, new.bias),
        [first + second for first, second in zip(old.lengths, new.lengths, strict=True)],
    )


def select_rows(slots: Slots, rows: list[int], kv_heads: int) -> Slots:
    """Take the slots of the batch rows `rows`, in that order."""
    heads = [row * kv_heads + head for row in rows for head in range(kv_heads)]

    def take(source: Tensor) -> Tensor:
        pieces = source.split(slots.lengths)
        return torch.cat([pieces[head] for head in heads])

    return Slots(take(slots.keys), take(slots.values), take(slots.bias), [slots.lengths[head] for head in heads])
