"""Who loses a slot: what a rule that merges or drops has to go by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.tokens import Tokens


@dataclass(frozen=True)
class Losses:
    """The tokens of a layer, of which some lose their slots.

    affinity, lost, protected: `(batch, kv_heads, tokens)`, float, bool, bool; a protected token is never lost. lengths: how
    many tokens every head keeps, `batch * kv_heads` numbers. first: protected tokens at the beginning. strained: sets of
    neighbours may reach across protected tokens, or lose even their last slot.
    """

    tokens: Tokens
    affinity: Tensor
    lost: Tensor
    protected: Tensor
    lengths: list[int]
    first: int
    strained: bool


def most_affine(affinity: Tensor, allowed: Tensor, losses: Tensor) -> Tensor:
    """Mark the `losses` most affine of the allowed tokens of every head, or all allowed ones if they are fewer.

    `affinity` and `allowed` are `(batch, kv_heads, tokens)`, `losses` `(batch, kv_heads)`. Ties go to the older token.
    """
    # An allowed token comes before all others whatever its affinity, so that the number of the lost is known beforehand.
    ranked = affinity.clamp_min(torch.finfo(affinity.dtype).min).masked_fill(~allowed, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < losses[..., None]) & allowed
