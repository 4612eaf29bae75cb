"""Curves and a budget in, a plan out: the thresholds at which every layer and head meets its share of the slots."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.reach import check_budget, check_reach


@dataclass(frozen=True)
class Solution:
    """What the solver found; `(layers, kv_heads)` where not said otherwise.

    share: fraction of the tokens that keep a slot. epsilon: the threshold that gives it; inf where nothing is merged.
    """

    share: NDArray[np.float64]
    epsilon: NDArray[np.float64]


def solve(
    thresholds: NDArray[np.float64],
    curves: NDArray[np.float64],
    budget: float,
    *,
    rule: str = "uniform",
    granularity: str = "head",
) -> Solution:
    """Find the thresholds that keep `budget` of all slots.

    `thresholds` is `(n,)`, rising; `curves` `(layers, kv_heads, n)` the measured share of slots at each, protected tokens
    counted. `rule`: `uniform` gives every head (`granularity` head) or every layer (layer) the budget; `common` takes
    one threshold for the whole model and lets the shares emerge. Between thresholds the curves are linear, so the mean of
    the shares equals the budget to rounding.

    Raises UsageError for a budget outside (0, 1], MismatchError with the reachable range where protected tokens alone
    exceed it.
    """
    check_budget(budget)
    # A greedy partition may need a set more at a lower threshold; the curve to invert must not fall.
    curves = np.maximum.accumulate(curves, axis=-1)
    layers, heads, _ = curves.shape
    if rule == "common":
        groups = curves.mean(axis=(0, 1))[None]
    elif granularity == "layer":
        groups = curves.mean(axis=1)
    else:
        groups = curves.reshape(layers * heads, -1)
    floor = float(groups[:, 0].max())
    check_reach(
        budget,
        floor,
        because="protected tokens and the set rule keep at least {lowest} of the slots somewhere",
        instead=", or calibrate with a policy that protects less",
    )
    found = thresholds_of(thresholds, groups, np.full(len(groups), budget))
    if rule == "common":
        epsilon = np.broadcast_to(found, (layers, heads)).copy()
    elif granularity == "layer":
        epsilon = np.broadcast_to(found[:, None], (layers, heads)).copy()
    else:
        epsilon = found.reshape(layers, heads)
    share = np.where(np.isinf(epsilon), 1.0, interpolate(epsilon, thresholds, curves))
    return Solution(share, epsilon)


def thresholds_of(
    thresholds: NDArray[np.float64], curves: NDArray[np.float64], shares: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Invert curves: the threshold `(...)` at which each of `curves` `(..., n)` has its share; inf where that is all."""
    shares = np.asarray(shares)
    flat = np.maximum.accumulate(curves, axis=-1).reshape(-1, curves.shape[-1])
    found = [
        np.inf if share >= 1 else float(np.interp(share, curve, thresholds))
        for share, curve in zip(shares.ravel(), flat, strict=True)
    ]
    return np.array(found).reshape(shares.shape)


def interpolate(
    places: NDArray[np.float64], grid: NDArray[np.float64], curves: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Every curve of `curves` `(..., n)` over `grid` `(n,)` at its own place `(...)`: `np.interp` for many curves at once."""
    if len(grid) == 1:
        return curves[..., 0]
    # In the ends' steps and beyond them, as np.interp does it: the value at the end.
    inside = np.clip(places, grid[0], grid[-1])
    before = np.clip(np.searchsorted(grid, inside, side="right") - 1, 0, len(grid) - 2)[..., None]
    low, high = (np.take_along_axis(curves, before + step, axis=-1)[..., 0] for step in (0, 1))
    left, right = grid[before[..., 0]], grid[before[..., 0] + 1]
    return np.where(inside == right, high, (high - low) / (right - left) * (inside - left) + low)
