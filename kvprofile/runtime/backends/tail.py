"""What all back ends share: which tail tokens a query may see, and the mass the tail receives."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall


def hidden_tail(call: "AttentionCall", low: int, high: int, padding: Tensor | None) -> Tensor | None:
    """Mark the tail tokens that queries `low` to `high` must not see: `(batch or 1, queries, tail)`; None if there are none.

    The newest query sees the whole tail, so query q sees it up to position q + tail - queries.
    """
    queries, tail = call.query.shape[2], call.key.shape[2]
    hidden = None
    if queries > 1:
        newest = torch.arange(low, high, device=call.key.device) + (tail - queries)
        hidden = (torch.arange(tail, device=call.key.device) > newest[:, None])[None]
    if padding is not None:
        hidden = padding[:, None] if hidden is None else hidden | padding[:, None]
    return hidden


def received(weights: Tensor, call: "AttentionCall", low: int, high: int, padding: Tensor | None) -> Tensor:
    """Sum the attention `weights` `(batch * kv_heads, group * queries, tail)` of queries `low` to `high` over the queries.

    Padded queries give none. Returns `(batch * kv_heads, tail)`.
    """
    if padding is None:
        return weights.sum(1)
    batch, kv_heads, tail = call.key.shape[:3]
    offset = tail - call.query.shape[2]
    asking = ~padding[:, None, None, low + offset : high + offset, None]
    return (weights.view(batch, kv_heads, -1, high - low, tail) * asking).sum((2, 3)).flatten(0, 1)
