"""Protected tokens: the ones that keep a slot of their own whatever their keys look like."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.tokens import Tokens


@dataclass(frozen=True)
class Protection:
    """Which tokens are never merged; shares are fractions of the tokens seen.

    KVMerger (arXiv 2407.08454) protects the most recent share and the share with the largest aggregated attention
    (17% and 12% at a budget of 50%). The first tokens are attention sinks (StreamingLLM, arXiv 2309.17453).

    first: tokens at the beginning, a count.
    recent: the newest tokens, a count.
    recent_share, heavy_share: fractions of the tokens seen, the newest and those with the largest attention mass.
    """

    first: int = 4
    recent: int = 32
    recent_share: float = 0.0
    heavy_share: float = 0.0

    def recent_tokens(self, tokens: int) -> int:
        """Number of newest tokens kept apart after `tokens` tokens."""
        return min(tokens, max(self.recent, math.ceil(self.recent_share * tokens)))

    def heavy_tokens(self, tokens: int) -> int:
        """Number of tokens kept for their attention mass after `tokens` tokens."""
        return math.ceil(self.heavy_share * tokens)


def protected_tokens(protection: Protection, tokens: Tokens, heavy: int) -> Tensor:
    """Mark the first tokens of the text and the `heavy` heaviest: `(batch, kv_heads, tokens)`.

    The recent tokens are not marked: callers hold them apart.
    """
    shape = tokens.keys.shape[:3]
    protected = torch.zeros(shape, dtype=torch.bool, device=tokens.keys.device)
    protected[..., : max(0, protection.first - tokens.position)] = True
    heavy = min(heavy, shape[-1])
    if heavy > 0:
        if tokens.mass is None:
            raise ValueError("protecting heavy hitters needs the attention mass")
        protected.scatter_(-1, tokens.mass.topk(heavy, dim=-1).indices, True)
    return protected
