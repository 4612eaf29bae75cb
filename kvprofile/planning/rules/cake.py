"""CAKE (arXiv 2503.12491): slots for layers that look in many places, and in changing ones."""

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.rules.fit import proportional

# The published exponents are tuned for every model and cache size, from 0.4 to 2.3; 1 is the default of the published code.
ENTROPY_TEMPERATURE = VARIANCE_TEMPERATURE = 1.0


def cake(
    entropy: NDArray[np.float64], variance: NDArray[np.float64], *, budget: float, floor: float
) -> NDArray[np.float64]:
    """Shares `(layers,)` in proportion to entropy^(1/t1) * variance^(1/t2) of the newest queries' attention.

    `entropy` and `variance` are `(layers,)`, as `measure.window` takes them; what is dealt out lies above the floor, as the
    published budget lies above the window.
    """
    preference = entropy ** (1 / ENTROPY_TEMPERATURE) * variance ** (1 / VARIANCE_TEMPERATURE)
    return proportional(preference, budget, floor=floor)
