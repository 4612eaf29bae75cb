"""Token by token similarity maps, pooled to a size one can look at (the paper's Fig. 2)."""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CELLS = 40


class SimilarityMap:
    """Mean cosine between blocks of tokens: `CELLS` x `CELLS` per layer and head.

    The mean over all pairs of two blocks is the product of the blocks' mean unit keys, so the tokens x tokens matrix is
    never formed. On the diagonal a token's similarity with itself is left out.
    """

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.sums = np.zeros((layers, kv_heads, CELLS, CELLS))
        self.samples = np.zeros(layers, dtype=np.int64)

    def update(self, layer: int, keys: Tensor) -> None:
        """Add one sample's layer: `keys` is `(kv_heads, tokens, head_dim)`; tokens past a whole cell are left out."""
        size = keys.shape[1] // CELLS
        unit = F.normalize(keys[:, : size * CELLS].float(), dim=-1)
        centre = unit.unflatten(1, (CELLS, size)).mean(2)
        pooled = centre @ centre.transpose(-1, -2)
        diagonal = torch.diagonal(pooled, dim1=-2, dim2=-1)
        diagonal.copy_((diagonal * size - 1) / max(1, size - 1) if size > 1 else diagonal)
        self.sums[layer] += pooled.double().cpu().numpy()
        self.samples[layer] += 1

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return {"sums": self.sums, "samples": self.samples}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.sums += other.sums
        self.samples += other.samples

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`similarity_map`, `(layers, kv_heads, CELLS, CELLS)` float16."""
        mean = self.sums / np.maximum(self.samples, 1)[:, None, None, None]
        return {"similarity_map": mean.astype(np.float16)}
