"""From what a rule wishes to shares that meet the budget: within the floor and 1, their mean the budget, on a grid.

Published rules deal out some hundred tokens of prompts of thousands, so they hardly say what happens where a layer would
get more than all of its tokens, or fewer than are protected. Here that is decided once, for all rules.
"""

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.allocate import STEPS

_TINY = 1e-9


def proportional(weights: NDArray[np.float64], budget: float, *, floor: float, cap: float = 1.0) -> NDArray[np.float64]:
    """What lies above the floor, in proportion to `weights` `(layers,)`; what one layer cannot take goes to the others.

    Returns shares `(layers,)` from `floor` to `cap` whose mean is `budget`, as far as the cap allows.
    """
    weights = np.maximum(weights, _TINY * max(float(weights.max()), _TINY))  # everybody can take what nobody else can
    shares = np.full(len(weights), floor)
    open_to_more = np.ones(len(weights), dtype=bool)
    while open_to_more.any():
        # The layers that are full stay full; the rest is dealt out anew to the others, until none overflows.
        left = budget * len(weights) - shares[~open_to_more].sum() - floor * open_to_more.sum()
        wanted = floor + left * weights / weights[open_to_more].sum()
        overflowing = open_to_more & (wanted > cap)
        if not overflowing.any():
            shares[open_to_more] = wanted[open_to_more]
            break
        shares[overflowing] = cap
        open_to_more &= ~overflowing
    return shares


def within(wanted: NDArray[np.float64], budget: float, *, floor: float) -> NDArray[np.float64]:
    """Clip `wanted` `(layers,)` to the floor and 1; what that adds or takes is spread in proportion to each layer's room."""
    shares = np.clip(wanted, floor, 1.0)
    missing = budget * len(shares) - shares.sum()
    room = 1.0 - shares if missing > 0 else shares - floor
    return shares + missing * room / max(float(room.sum()), _TINY)


def on_grid(shares: NDArray[np.float64], budget: float) -> NDArray[np.float64]:
    """Round `shares` `(layers,)` to whole steps of 1/256, as the solver's are, by largest remainders.

    Their sum is the budget: what is left of a step goes to one layer. So a text whose length is a multiple of 256 is met to
    the slot, and no layer is off by more than a step.
    """
    steps = shares * STEPS
    whole = np.floor(steps + _TINY)
    left = budget * len(shares) * STEPS - whole.sum()
    for layer in np.argsort(whole - steps, kind="stable"):
        more = float(np.clip(left, 0.0, 1.0))
        whole[layer] += more
        left -= more
    return whole / STEPS
