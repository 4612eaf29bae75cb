"""Who loses a slot: what a rule that merges or drops has to go by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.tokens import Tokens


@dataclass(frozen=True)
class Losses:
    """The tokens of a layer, of which some lose their slots.

    affinity, lost, protected: `(batch, kv_heads, tokens)`, float, bool, bool; a protected token is never lost.
    """

    tokens: Tokens
    affinity: Tensor
    lost: Tensor
    protected: Tensor


def most_affine(affinity: Tensor, allowed: Tensor, losses: Tensor) -> Tensor:
    """Mark the `losses` most affine of the allowed tokens of every head, or all allowed ones if they are fewer.

    `affinity` and `allowed` are `(batch, kv_heads, tokens)`, `losses` `(batch, kv_heads)`. Ties go to the older token.
    """
    order = affinity.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < losses[..., None]) & allowed
