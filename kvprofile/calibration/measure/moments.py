"""Mean and spread of an array per layer, streaming over samples."""

from typing import Self

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Running mean and variance of arrays of shape `(layers, *shape)`, one layer at a time.

    Updates follow Welford, merges Chan, Golub and LeVeque (1979), in float64: exact enough that the order of samples
    shows only in the last digits. Merging the moments of one sample is the same, to the bit, as updating with it.
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

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        total = self.count + other.count
        ones = (slice(None), *(None,) * (self.mean.ndim - 1))
        parts = np.divide(total, other.count, out=np.full(len(total), np.inf), where=other.count > 0)
        delta = other.mean - self.mean
        # In the form of `update`, so that merging one sample gives the very bits of updating with it.
        self.mean += delta / parts[ones]
        self.squares += other.squares + delta * (other.mean - self.mean) * other.count[ones]
        self.count = total

    def std(self) -> NDArray[np.float64]:
        """Sample standard deviation (n - 1), `(layers, *shape)`; 0 where there are fewer than two samples."""
        divisor = np.maximum(self.count - 1, 1)[(slice(None), *(None,) * (self.mean.ndim - 1))]
        return np.sqrt(self.squares / divisor)
