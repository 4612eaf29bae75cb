"""Spend a budget where it hurts least: what every cost buys a head, and a budget in, a share and a choice for every head out.

Minimise the sum of the heads' damage subject to the mean of their costs. Every head's candidates are the lower envelope of
its choices' curves on a fine grid of costs. For a price per unit of cost each head's best is independent of the others, and
raising the price lowers the total: bisection finds the price at which the budget is met (Everett 1963; the candidates are the
vertices of the convex hulls). What is left between two prices is spent on the heads that jump there, one of them in part.
The same prices give a lower bound on the optimum (weak duality), so how far the answer can be from it is known.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.choices import TINY, Choice, Curve, Envelope, lower_envelope
from kvprofile.planning.reach import check_budget, check_reach

STEPS = 256  # of the grid of costs


@dataclass(frozen=True)
class Allocation:
    """One entry per head.

    cost `(heads,)`: what every head may spend; their mean is the budget. choice `(heads,)`: index of what it gets. share
    `(heads,)`: fraction of the tokens that keep a slot. damage `(heads,)`: predicted. bound: no allocation on the grid of
    costs has less damage in total.
    """

    cost: NDArray[np.float64]
    choice: NDArray[np.int64]
    share: NDArray[np.float64]
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
    """Choose every head's share and policy where slots are counted.

    `budgets` `(n,)`, rising and below 1, are the shares at which `damage` `(heads, policies, n)` was measured; at share 1
    damage is 0. `floor` `(policies,)` or a number: the share a policy's protected tokens take at least; `cap`: the most
    any head gets. Ties go to the smaller share and the earlier policy.

    Raises UsageError for a budget outside (0, 1], MismatchError with the reachable range where floors or the cap forbid it.
    """
    check_budget(budget)
    floors = np.broadcast_to(np.asarray(floor, dtype=float), damage.shape[1])
    choices = [Choice(Curve(budgets, damage[:, index]), float(least)) for index, least in enumerate(floors)]
    envelope = lower_envelope(choices, STEPS, cap)
    check_slots(envelope, budget)
    return spend(envelope, budget)


def check_slots(envelope: Envelope, budget: float) -> None:
    """Raise MismatchError where slots are counted and the envelope does not reach the budget."""
    because = "protected tokens keep at least {lowest} of the slots of every head"
    if envelope.costs[-1] < 1:
        because += " and the cap allows {highest}"
    check_reach(budget, envelope.costs[0], envelope.costs[-1], because=because)


def spend(envelope: Envelope, budget: float) -> Allocation:
    """Choose for every head what it gets for the least damage, the mean of their costs being the budget, which is in reach."""
    costs, damage, choice = envelope.costs, envelope.damage, envelope.choice
    highest = costs[-1]
    heads = np.arange(len(damage))
    wanted = budget * len(heads)
    cheap, dear, bound = _prices(costs, damage, wanted)
    # From the choices at the higher price, which fit, towards those at the lower: steepest improvement per cost first.
    chosen = dear.copy()
    left = wanted - costs[chosen].sum()
    gain = (damage[heads, dear] - damage[heads, cheap]) / np.maximum(costs[cheap] - costs[dear], TINY)
    cost = costs[chosen].copy()
    for head in np.argsort(-gain, kind="stable"):
        more = min(costs[cheap[head]] - cost[head], left)
        cost[head] += more
        left -= more
        if left <= TINY:
            break
    # Ties at one price may leave some over; it goes to any head below the cap, in order.
    for head in heads:
        if left <= TINY:
            break
        more = min(highest - cost[head], left)
        cost[head] += more
        left -= more
    # A partial step is charged, and its choice taken, at the grid point below it: the damage is no more than that.
    chosen = np.clip(np.searchsorted(costs, cost + 1e-9, side="right") - 1, 0, len(costs) - 1)
    taken = choice[heads, chosen]
    share = np.array([envelope.choices[index].share(cost[head]) for head, index in enumerate(taken)], dtype=float)
    return Allocation(cost, taken, share, damage[heads, chosen], bound)


def _prices(
    costs: NDArray[np.float64], envelope: NDArray[np.float64], wanted: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Bisect the price of a unit of cost: the choices `(heads,)` just above and just below the budget, and the lower bound."""

    def choices(price: float) -> NDArray[np.int64]:
        return (envelope + price * costs).argmin(axis=1)

    def dual(price: float, chosen: NDArray[np.int64]) -> float:
        return float((envelope[np.arange(len(chosen)), chosen] + price * costs[chosen]).sum() - price * wanted)

    # Above the steepest slope there is, every head takes its least cost.
    fall = float(np.where(np.isfinite(envelope), envelope, 0).max(initial=0.0))
    low, high = 0.0, 1.0 + fall / float(np.diff(costs).min(initial=1.0))
    cheap, dear = choices(low), choices(high)
    bound = max(dual(low, cheap), dual(high, dear))
    if costs[cheap].sum() <= wanted:
        return cheap, cheap, bound
    for _ in range(200):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        chosen = choices(price)
        bound = max(bound, dual(price, chosen))
        if costs[chosen].sum() > wanted:
            low, cheap = price, chosen
        else:
            high, dear = price, chosen
        if high - low <= 1e-13 * high:
            break
    return cheap, dear, bound
