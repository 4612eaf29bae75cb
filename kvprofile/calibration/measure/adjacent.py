"""How similar neighbouring keys, and neighbouring values, are: a histogram of cosines per layer and head."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.merging.sets import adjacent_cosine

BINS = 512


class AdjacentSimilarity:
    """Histogram over [-1, 1] of the cosine between neighbouring tokens, for keys and for values.

    With chain sets the number of slots is the number of tokens less the number of links at or above the threshold, so
    this histogram is the compression ratio at every threshold at once, to a bin's width (1/256). Counts add over samples,
    processes and machines.
    """

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.keys = np.zeros((layers, kv_heads, BINS), dtype=np.int64)
        self.values = np.zeros((layers, kv_heads, BINS), dtype=np.int64)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add one sample's layer: `keys` and `values` are `(kv_heads, tokens, dim)`."""
        counts = torch.stack([_histogram(adjacent_cosine(part)) for part in (keys, values)]).cpu().numpy()
        self.keys[layer] += counts[0]
        self.values[layer] += counts[1]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return {"keys": self.keys, "values": self.values}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.keys += other.keys
        self.values += other.values

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`key_histogram` and `value_histogram`, `(layers, kv_heads, BINS)` counts."""
        return {"key_histogram": self.keys.astype(np.int32), "value_histogram": self.values.astype(np.int32)}


def _histogram(cosine: Tensor) -> Tensor:
    """Counts `(kv_heads, BINS)` of `cosine` `(kv_heads, links)`; bin i covers [-1 + i/256, -1 + (i + 1)/256)."""
    index = ((cosine + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    # Not by bincount, which asks the device for the highest index.
    return torch.zeros(len(index), BINS, dtype=torch.long, device=index.device).scatter_add_(
        1, index, torch.ones_like(index)
    )
