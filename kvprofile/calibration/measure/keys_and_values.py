"""What is measured of keys and of values apart: its mean over samples, kept, joined and handed out under two names."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvprofile.calibration.measure.moments import Moments


class KeysAndValues:
    """Mean over samples of numbers `(layers, 2, *shape)`, of keys and then of values.

    name: of the arrays, behind `key_` and `value_`.
    """

    name: str

    def __init__(self, layers: int, shape: tuple[int, ...]) -> None:
        self.shape = (2, *shape)
        self.moments = Moments(layers, self.shape)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return self.moments.state()

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """The means, `(layers, *shape)` each, float32."""
        keys, values = self.moments.mean.astype(np.float32).swapaxes(0, 1)
        return {f"key_{self.name}": keys, f"value_{self.name}": values}
