"""How the similarity of two keys falls with their distance in the text."""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class SimilarityByDistance:
    """Mean cosine of all pairs of keys d tokens apart, for every d from 1 to `tokens - 1`.

    The sum over all pairs at one distance is the autocorrelation of the unit keys, so one Fourier transform gives every
    distance exactly, instead of one product per distance.
    """

    def __init__(self, layers: int, kv_heads: int, tokens: int) -> None:
        self.sums = np.zeros((layers, kv_heads, tokens - 1))
        self.pairs = np.zeros((layers, tokens - 1), dtype=np.int64)

    def update(self, layer: int, keys: Tensor) -> None:
        """Add one sample's layer: `keys` is `(kv_heads, tokens, head_dim)`, at most the tokens asked for."""
        tokens = keys.shape[1]
        unit = F.normalize(keys.float(), dim=-1)
        # Zero padding to twice the length keeps the correlation from wrapping around.
        spectrum = torch.fft.rfft(unit, n=2 * tokens, dim=1)
        power = (spectrum.real.square() + spectrum.imag.square()).sum(-1)
        correlation = torch.fft.irfft(power, n=2 * tokens, dim=1)[:, 1:tokens]
        self.sums[layer, :, : tokens - 1] += correlation.double().cpu().numpy()
        self.pairs[layer, : tokens - 1] += np.arange(tokens - 1, 0, -1)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return {"sums": self.sums, "pairs": self.pairs}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.sums += other.sums
        self.pairs += other.pairs

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`distances` `(n,)` in tokens and `similarity_by_distance` `(layers, kv_heads, n)`, the mean cosine at each.

        All distances up to 64, then about 32 to every doubling.
        """
        longest = self.sums.shape[-1]
        spread = np.geomspace(64, max(64, longest), 1 + round(32 * np.log2(max(64, longest) / 64)))
        distances = np.unique(np.concatenate([np.arange(1, 65), np.round(spread)]).astype(np.int32))
        distances = distances[distances <= longest]
        mean = self.sums / np.maximum(self.pairs, 1)[:, None, :]
        return {"distances": distances, "similarity_by_distance": mean[..., distances - 1].astype(np.float32)}
