"""From shares to whole slots."""

import torch
from torch import Tensor


def slots_of(shares: Tensor, tokens: int) -> Tensor:
    """Whole slots per head that add up to the layer's budget, rounded once.

    `shares` is `(kv_heads,)`, fractions of `tokens`. Largest remainders first (ties to the lower head), so every head is
    within one slot of its share and the layer within half a slot of its own.
    """
    wanted = shares.double() * tokens
    # Shares are stored with six decimals: 0.3333333 * 3 tokens must count as 1, not as 0.9999999.
    whole = (wanted + 1e-6).floor()
    missing = int(torch.round(wanted.sum() - whole.sum()).item())
    order = (wanted - whole).argsort(descending=True, stable=True)
    whole[order[: max(0, missing)]] += 1
    return whole.long()
