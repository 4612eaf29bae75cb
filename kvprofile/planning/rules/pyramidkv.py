"""PyramidKV (arXiv 2406.02069): fewer slots the deeper the layer."""

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.rules.fit import within

SMALLEST = 20  # the published beta: the last layer gets a twentieth of the budget


def pyramidkv(depth: NDArray[np.float64], *, budget: float, floor: float) -> NDArray[np.float64]:
    """Shares `(layers,)` that fall linearly with `depth`, from 0 at the first merged layer to 1 at the last.

    As published, of the budget above the protected tokens the last layer gets a twentieth and the first twice the budget
    less that; where this is more than all tokens, the line is turned around its middle until it fits.
    """
    above = budget - floor
    most = min(2 * above - above / SMALLEST, 1.0 - floor)
    least = 2 * above - most
    return within(floor + most + (least - most) * depth, budget, floor=floor)
