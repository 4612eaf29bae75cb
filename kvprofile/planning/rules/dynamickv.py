"""DynamicKV (arXiv 2412.14838): slots for the layers whose scores win against those of the other layers."""

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.rules.fit import proportional

EVERY = 4  # layers between two rankings
MOST = 10  # times the budget: what one layer gets at most


def dynamickv(histogram: NDArray[np.floating], *, budget: float, floor: float) -> NDArray[np.float64]:
    """Shares `(layers,)` by rank among all scores of all layers.

    `histogram` `(layers, bins)` counts the scores of a layer's tokens and heads, rising, as `measure.window` takes them.
    After every fourth layer, and after the last, the scores of the layers so far are ranked together; the best ones, as many
    as the layers' budgets, are counted by layer, the counts are scaled to the whole model's budget, and every layer is
    cut to its own. Layers already cut do not grow again. In the end shares are scaled to the budget. The published method
    ranks for every prompt; here the scores of all samples are ranked at once.
    """
    layers = len(histogram)
    above, room = budget - floor, 1.0 - floor
    most = min(MOST * above, room)
    kept = np.full(layers, most)
    for seen in (*range(EVERY, layers, EVERY), layers):
        counts = room * winners(histogram[:seen], above / room if room else 0.0)
        scaled = counts * above * layers / max(float(counts.sum()), 1e-12)
        kept[:seen] = np.minimum(kept[:seen], scaled)
    return proportional(kept, budget, floor=floor, cap=floor + most)


def winners(histogram: NDArray[np.floating], part: float) -> NDArray[np.float64]:
    """Part of each layer's scores `(layers,)` among the best `part` of the scores of all layers.

    Within the bin that the line runs through, scores count in proportion.
    """
    totals = np.maximum(histogram.sum(axis=1, keepdims=True), 1)
    # Part of each layer's scores in or above each bin, and then that of none: from 1 down to 0.
    survival = np.pad(np.cumsum((histogram / totals)[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    overall = survival.mean(axis=0)
    line = np.interp(part, overall[::-1], np.arange(survival.shape[1])[::-1])
    return np.array([np.interp(line, np.arange(survival.shape[1]), curve) for curve in survival])
