"""PrefixKV (arXiv 2412.03409): every layer keeps the same part of its attention mass."""

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.rules.fit import within

HALVINGS = 60


def prefixkv(coverage: NDArray[np.float64], *, budget: float, floor: float) -> NDArray[np.float64]:
    """Shares `(layers,)` that hold a common part p of the attention mass; p is bisected until they meet the budget.

    `coverage` `(layers, n)` is the part of a layer's mass that lies on its j + 1 n-ths of heaviest tokens, as
    `measure.coverage` takes it.
    """
    grid = np.arange(coverage.shape[1] + 1) / coverage.shape[1]
    curves = np.maximum.accumulate(np.pad(coverage, ((0, 0), (1, 0))), axis=1)

    def needed(part: float) -> NDArray[np.float64]:
        return np.maximum([np.interp(part, curve, grid) for curve in curves], floor)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle).mean() <= budget else (low, middle)
    # Below p = 1 a layer may need all but tokens without any mass: `within` hands those out.
    return within(needed(low), budget, floor=floor)
