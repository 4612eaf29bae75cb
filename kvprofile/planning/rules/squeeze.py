"""SqueezeAttention (arXiv 2404.04793): fewer slots for the layers whose attention changes the hidden state least."""

from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.rules.fit import within

GROUPS = 3
# What the least important group keeps of its budget: the published example starts from 21% and leaves that group 8%.
KEPT = 8 / 21


def squeeze(cosine: NDArray[np.float64], *, budget: float, floor: float) -> NDArray[np.float64]:
    """Shares `(layers,)`: the group of layers with the highest cosine is cut, and the others share alike what it loses.

    `cosine` `(layers,)` is that of the hidden state before and after attention, as `measure.hidden` takes it.
    """
    cut = nearest_groups(cosine) == GROUPS - 1
    if cut.all() or not cut.any():
        return within(np.full(len(cosine), budget), budget, floor=floor)
    least = KEPT * budget
    others = (len(cosine) * budget - cut.sum() * least) / (~cut).sum()
    return within(np.where(cut, least, others), budget, floor=floor)


def nearest_groups(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Group `(n,)` of every value, 0 to 2 from low to high: the k-means clusters, found exactly.

    On a line clusters are neighbours, so all ways to cut the sorted values are tried. Fewer different values than
    groups make fewer groups, the highest being 2.
    """
    points, counts = np.unique(values, return_counts=True)
    groups = min(GROUPS, len(points))
    centred = points - points.mean()  # cosines are close to each other: their squares would drown the differences
    sums = [np.concatenate([[0.0], np.cumsum(counts * centred**power)]) for power in (0, 1, 2)]

    def spread(low: int, high: int) -> float:
        count, total, squares = (part[high] - part[low] for part in sums)
        return float(squares - total**2 / count)

    def cost(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, len(points))
        return sum(spread(low, high) for low, high in pairwise(ends))

    best = min(combinations(range(1, len(points)), groups - 1), key=cost)
    return np.searchsorted(points[list(best)], values, side="right") + GROUPS - groups
