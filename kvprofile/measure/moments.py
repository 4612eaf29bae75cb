"""Mean and spread of an array per layer, streaming over samples."""

from typing import Self

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Running mean and variance of arrays of shape `(layers, *shape)`, one layer at a time.

    Updates follow Welford, merges Chan, Golub and LeVeque (1979), in float64: exact enough that the order of samples
    shows only in the last digits.
    """

    def __init__(self, layers: int, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(layers, dtype=np.int64)
        self.mean = np.zeros((layers, *shape))
        self.squares = np.zeros((layers, *shape))

    def update(self, layer: int, value: NDArray[np.floating]) -> None:
        """Add one sample's value for one layer."""
        self.count[layer] += 1
        delta = value - self.mean[layer]
        self.mean[layer] += delta / self.count[layer]
        self.squares[layer] += delta * (value - self.mean[layer])

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        total = self.count + other.count
        ones = (slice(None), *(None,) * (self.mean.ndim - 1))
        weight = np.divide(other.count, total, out=np.zeros(len(total)), where=total > 0)[ones]
        delta = other.mean - self.mean
        self.squares += other.squares + delta**2 * weight * self.count[ones]
        self.mean += delta * weight
        self.count = total

    def std(self) -> NDArray[np.float64]:
        """Sample standard deviation (n - 1), `(layers, *shape)`; 0 where there are fewer than two samples."""
        divisor = np.maximum(self.count - 1, 1)[(slice(None), *(None,) * (self.mean.ndim - 1))]
        return np.sqrt(self.squares / divisor)
