"""How much of the attention mass the heaviest tokens hold: what PrefixKV goes by (arXiv 2412.03409)."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments

POINTS = 256  # the solver's grid of shares


class MassCoverage:
    """Part of a layer's attention mass on its heaviest tokens, for 256 shares of the tokens; mean over samples.

    The mass is that of all heads together, so a layer has one ranking, as published.
    """

    def __init__(self, layers: int) -> None:
        self.moments = Moments(layers, (POINTS,))

    def update(self, layer: int, mass: Tensor) -> None:
        """Add one sample's layer: the attention `mass` `(kv_heads, tokens)`."""
        falling = mass.double().sum(0).sort(descending=True).values
        covered = torch.cumsum(falling, 0).cpu().numpy()
        shares = np.arange(1, POINTS + 1) / POINTS
        tokens = np.arange(len(covered) + 1) / len(covered)
        self.moments.update(layer, np.interp(shares, tokens, np.concatenate([[0.0], covered / covered[-1]])))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return self.moments.state()

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`mass_coverage` `(layers, 256)`: at j the part of the mass on the (j + 1) / 256 heaviest tokens; none if not seen."""
        return {"mass_coverage": self.moments.mean.astype(np.float32)} if self.moments.count.any() else {}
