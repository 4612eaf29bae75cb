"""How the newest queries look at the context: what CAKE (arXiv 2503.12491) and DynamicKV (arXiv 2412.14838) go by."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments
from kvprofile.merging.scores import pooled
from kvprofile.merging.softmax import Softmax

WINDOW = 32  # newest queries, and tokens left out because they always stay
BINS = 1024
_LOWEST, _HIGHEST = -40.0, 12.0  # powers of two the scores are binned between
_TINY = 1e-30


class WindowAttention:
    """Entropy and variance of the newest queries' attention to the tokens before them, and a histogram of their scores.

    Entropy is summed over heads and queries; variance is taken over the queries and summed over heads and tokens (CAKE,
    equations 3 to 5); both are means over samples. A token's score is the attention it receives from all the queries of a KV
    head's group, averaged over neighbours (SnapKV's pooling, which DynamicKV takes over).
    """

    def __init__(self, layers: int) -> None:
        self.moments = Moments(layers, (2,))
        self.histogram = np.zeros((layers, BINS), dtype=np.int64)

    def update(self, layer: int, attention: Tensor) -> None:
        """Add one sample's layer: `window_attention` of it, `(kv_heads, group, queries, tokens)`."""
        older = attention[..., : attention.shape[-1] - attention.shape[-2]]
        entropy = -(older * older.clamp_min(_TINY).log()).sum()
        variance = older.var(dim=2).sum()
        self.moments.update(layer, torch.stack([entropy, variance]).cpu().double().numpy())
        scores = pooled(older.sum(dim=(1, 2))[None])[0]
        place = (scores.clamp_min(_TINY).log2() - _LOWEST) * (BINS / (_HIGHEST - _LOWEST))
        index = place.long().clamp_(0, BINS - 1).reshape(-1)
        # Not by bincount, which asks the device for the highest index.
        counts = torch.zeros(BINS, dtype=torch.long, device=index.device).scatter_add_(0, index, torch.ones_like(index))
        self.histogram[layer] += counts.cpu().numpy()

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return {**self.moments.state(), "histogram": self.histogram}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)
        self.histogram += other.histogram

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`window_entropy` and `window_variance` `(layers,)`; `window_histogram` `(layers, 1024)`, by the score's logarithm.

        Nothing if no attention was seen.
        """
        if not self.moments.count.any():
            return {}
        return {
            "window_entropy": self.moments.mean[:, 0].astype(np.float32),
            "window_variance": self.moments.mean[:, 1].astype(np.float32),
            "window_histogram": self.histogram.astype(np.int32),
        }


def window_attention(query: Tensor, key: Tensor, softmax: Softmax) -> Tensor:
    """Attention of the newest queries, `(kv_heads, group, queries, tokens)` float32; at most half the tokens are queries.

    `query` is `(1, heads, queries, head_dim)`, `key` `(1, kv_heads, tokens, head_dim)`; attention is causal.
    """
    heads, kv_heads, tokens = query.shape[1], key.shape[1], key.shape[2]
    newest = min(WINDOW, tokens // 2)
    chosen = query[0, :, -newest:].unflatten(0, (kv_heads, heads // kv_heads))
    logits = softmax.cap_((chosen @ key[0, :, None].transpose(-1, -2)).float().mul_(softmax.scaling))
    positions = torch.arange(tokens, device=key.device)
    logits.masked_fill_(positions > positions[-newest:, None], -torch.inf)
    if softmax.sinks is not None:
        aside = softmax.sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, newest, -1)
        logits = torch.cat([logits, aside], dim=-1)
    return torch.softmax(logits, dim=-1)[..., :tokens]
