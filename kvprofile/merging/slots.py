"""The slots of a layer: what merged tokens become, a different number for every head."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Slots:
    """What is left of the merged tokens: head (b, h) owns `lengths[b * kv_heads + h]` consecutive rows.

    keys `(slots, head_dim)`, values `(slots, value_dim)`, bias `(slots,)` float32: what is added to a slot's logits.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    lengths: list[int]
