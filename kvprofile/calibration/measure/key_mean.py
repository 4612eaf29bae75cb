"""The mean key of every layer and KV head, by which codecs centre keys."""

from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments


class KeyMean:
    """Mean over tokens and samples of the keys, after their rotation by position.

    A few channels of keys lie far from zero at every token (KIVI, arXiv 2402.02750), where few bits would be spent on telling
    so again and again. Layers whose keys have another dimension than the model's heads are left out.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.moments = Moments(layers, (kv_heads, head_dim))

    def update(self, layer: int, keys: Tensor) -> None:
        """Add one sample's layer: `keys` is `(kv_heads, tokens, head_dim)`."""
        if (keys.shape[0], keys.shape[2]) == self.moments.mean.shape[1:]:
            self.moments.update(layer, keys.double().mean(1).cpu().numpy())

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return self.moments.state()

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`key_mean`, `(layers, kv_heads, head_dim)`; zeros for layers that were not seen."""
        return {"key_mean": self.moments.mean.astype(np.float32)}
