"""How much a change of a layer's attention output changes the model's answer (`damage.py` says why)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Weighing:
    """Gradients `(draws, queries, heads, value_dim)` of the answers at a layer's output, and `kind` `(queries,)` of each query.

    gradients `(kv_heads, draws, group * queries, value_dim)`: laid out like a change of the output, which they often weigh.
    of_kind `(queries, kinds)`: the mean over the queries of each of `kinds`.
    """

    def __init__(self, gradients: Tensor, kind: Tensor, kinds: Sequence[int], kv_heads: int) -> None:
        _, self.queries, heads, _ = gradients.shape
        self.group = heads // kv_heads
        split = gradients.unflatten(2, (kv_heads, self.group))
        self.gradients = split.permute(2, 0, 3, 1, 4).flatten(2, 3).contiguous()
        member = torch.stack([kind == one for one in kinds], dim=1).float()
        self.of_kind = member / member.sum(0)

    def damage(self, change: Tensor) -> Tensor:
        """Damage `(kv_heads, kinds)` of a change `(kv_heads, group * queries, value_dim)`; NaN for a kind nobody is of."""
        slope = (self.gradients * change[:, None]).sum(-1).unflatten(2, (self.group, self.queries)).sum(2)
        return (slope.square().mean(1) / 2) @ self.of_kind
