"""Spend every slot where it hurts least: damage curves and a budget in, a share and a policy for every head out.

Minimise the sum of the heads' damage subject to the mean of their shares. Every head's candidates are the lower envelope of
its policies' curves on a fine grid of shares. For a price per slot each head's best choice is independent of the others, and
raising the price lowers the total: bisection finds the price at which the budget is met (Everett 1963; the choices are the
vertices of the convex hulls). What is left between two prices is spent on the heads that jump there, one of them in part.
The same prices give a lower bound on the optimum (weak duality), so how far the answer can be from it is known.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import MismatchError
from kvprofile.planning.solve import check_budget

STEPS = 256
_TINY = 1e-12
Envelope = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]  # see `lower_envelope`


@dataclass(frozen=True)
class Allocation:
    """One entry per head.

    share `(heads,)`: fraction of the tokens that keep a slot; their mean is the budget. policy `(heads,)`: index of the
    policy. damage `(heads,)`: predicted. bound: no allocation on the grid of shares has less damage in total.
    """

    share: NDArray[np.float64]
    policy: NDArray[np.int64]
    damage: NDArray[np.float64]
    bound: float


def allocate(
    budgets: NDArray[np.float64],
    damage: NDArray[np.float64],
    budget: float,
    *,
    floor: NDArray[np.float64] | float = 0.0,
    cap: float = 1.0,
) -> Allocation:
    """Choose every head's share and policy.

    `budgets` `(n,)`, rising and below 1, are the shares at which `damage` `(heads, policies, n)` was measured; at share 1
    damage is 0. `floor` `(policies,)` or a number: the share a policy's protected tokens take at least; `cap`: the most
    any head gets. Ties go to the smaller share and the earlier policy.

    Raises UsageError for a budget outside (0, 1], MismatchError with the reachable range where floors or the cap forbid it.
    """
    floor = np.broadcast_to(np.asarray(floor, dtype=float), damage.shape[1])
    return spend(lower_envelope(budgets, damage, floor, cap), budget)


def spend(least: Envelope, budget: float) -> Allocation:
    """Choose every head's share and policy from what each share costs at least; raises as `allocate` does."""
    check_budget(budget)
    shares, envelope, policy = least
    lowest, highest = shares[0], shares[-1]
    if not lowest - 1e-9 <= budget <= highest + 1e-9:
        raise MismatchError(
            f"budget {budget:g} is out of reach: protected tokens keep at least {lowest:.3f} of the slots of every head and "
            f"the cap allows {highest:.3f}; ask for a budget from {np.ceil(lowest * 1000) / 1000:.3f} to {highest:.3f}"
        )
    heads = np.arange(len(envelope))
    wanted = budget * len(heads)
    cheap, dear, bound = _prices(shares, envelope, wanted)
    # From the choices at the higher price, which fit, towards those at the lower: steepest improvement per slot first.
    chosen = dear.copy()
    left = wanted - shares[chosen].sum()
    gain = (envelope[heads, dear] - envelope[heads, cheap]) / np.maximum(shares[cheap] - shares[dear], _TINY)
    share = shares[chosen].copy()
    for head in np.argsort(-gain, kind="stable"):
        more = min(shares[cheap[head]] - share[head], left)
        share[head] += more
        left -= more
        if left <= _TINY:
            break
    # Ties at one price may leave slots over; they go to any head below the cap, in order.
    for head in heads:
        if left <= _TINY:
            break
        more = min(highest - share[head], left)
        share[head] += more
        left -= more
    # A partial step is charged, and its policy taken, at the grid point below it: the damage is no more than that.
    chosen = np.clip(np.searchsorted(shares, share + 1e-9, side="right") - 1, 0, len(shares) - 1)
    return Allocation(share, policy[heads, chosen], envelope[heads, chosen], bound)


def lower_envelope(
    budgets: NDArray[np.float64], damage: NDArray[np.float64], floor: NDArray[np.float64], cap: float
) -> Envelope:
    """Shares `(m,)` on the fine grid, the least damage `(heads, m)` at each, and the policy `(heads, m)` that has it."""
    grid = np.arange(1, STEPS + 1) / STEPS
    shares = np.unique(np.concatenate([[floor.min()], grid[(grid > floor.min()) & (grid < cap)], [cap]]))
    # More slots never hurt a sensible policy; where a curve rises it is noise or a bad ranking, and fewer slots are given.
    falling = np.minimum.accumulate(damage, axis=-1)
    # Damage falls over orders of magnitude: interpolate its logarithm, and only the last stretch, to 0 at 1, linearly.
    place = np.clip(np.searchsorted(budgets, shares, side="right") - 1, 0, len(budgets) - 2)
    ahead = np.clip((shares - budgets[place]) / (budgets[place + 1] - budgets[place]), 0, 1)
    logs = np.log(np.maximum(falling, _TINY))
    curves = np.exp(logs[..., place] * (1 - ahead) + logs[..., place + 1] * ahead)
    last = shares > budgets[-1]
    curves[..., last] = falling[..., -1:] * (1 - shares[last]) / (1 - budgets[-1])
    curves[:, shares[None, :] < floor[:, None] - 1e-9] = np.inf
    policy = curves.argmin(axis=1)
    return shares, np.take_along_axis(curves, policy[:, None], axis=1)[:, 0], policy


def _prices(
    shares: NDArray[np.float64], envelope: NDArray[np.float64], wanted: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Bisect the price of a slot: the choices `(heads,)` just above and just below the budget, and the lower bound."""

    def choices(price: float) -> NDArray[np.int64]:
        return (envelope + price * shares).argmin(axis=1)

    def dual(price: float, chosen: NDArray[np.int64]) -> float:
        return float((envelope[np.arange(len(chosen)), chosen] + price * shares[chosen]).sum() - price * wanted)

    # Above the steepest slope there is, every head takes its least share.
    fall = float(np.where(np.isfinite(envelope), envelope, 0).max(initial=0.0))
    low, high = 0.0, 1.0 + fall / float(np.diff(shares).min(initial=1.0))
    cheap, dear = choices(low), choices(high)
    bound = max(dual(low, cheap), dual(high, dear))
    if shares[cheap].sum() <= wanted:
        return cheap, cheap, bound
    for _ in range(200):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        chosen = choices(price)
        bound = max(bound, dual(price, chosen))
        if shares[chosen].sum() > wanted:
            low, cheap = price, chosen
        else:
            high, dear = price, chosen
        if high - low <= 1e-13 * high:
            break
    return cheap, dear, bound
