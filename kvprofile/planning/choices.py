"""What a head can be given: choices, each with a curve of damage over shares of the tokens and a cost for every share.

The price multiplies cost. Where slots are counted a share costs itself; where bytes are, a slot costs what its policy and
codecs make of it. Whatever the unit, the choices meet on one grid of costs, and a head's best at every cost is their lower
envelope there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

TINY = 1e-12
CLOSE = 1e-9  # costs that near are one


@dataclass(frozen=True)
class Curve:
    """Damage `(heads, n)` measured at rising `shares` `(n,)`; between them its logarithm is interpolated."""

    shares: NDArray[np.float64]
    damage: NDArray[np.float64]

    def falling(self) -> Self:
        """The same where it never rises.

        More slots never hurt a sensible policy; where a curve rises it is noise or a bad ranking, and fewer slots are given.
        """
        return replace(self, damage=np.minimum.accumulate(self.damage, axis=-1))

    def at(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Damage `(heads, m)` at `shares` `(m,)`; beyond the ends that at the end."""
        if len(self.shares) == 1:
            return np.repeat(self.damage, len(shares), axis=-1)
        place = np.clip(np.searchsorted(self.shares, shares, side="right") - 1, 0, len(self.shares) - 2)
        ahead = np.clip((shares - self.shares[place]) / (self.shares[place + 1] - self.shares[place]), 0, 1)
        logs = np.log(np.maximum(self.damage, TINY))
        return np.exp(logs[..., place] * (1 - ahead) + logs[..., place + 1] * ahead)


@dataclass(frozen=True)
class Choice:
    """One policy, with its codecs where there are any.

    curve: damage by share. floor: least share, which protected tokens take. whole `(heads, 1)` or 0: damage with every token
    kept. A share costs `apart + slot * share`, all tokens `all_cost`. bridged: shares between the last that was measured and
    1 may be given, their damage on a straight line; otherwise a curve jumps there and none is.
    """

    curve: Curve
    floor: float
    whole: NDArray[np.float64] | float = 0.0
    slot: float = 1.0
    apart: float = 0.0
    all_cost: float = 1.0
    bridged: bool = True

    @property
    def least_cost(self) -> float:
        """What the least share costs."""
        return self.apart + self.slot * self.floor

    def share(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share that a cost pays, of every one of `costs`; never more than 1."""
        paid = costs if self.slot == 1.0 and self.apart == 0.0 else (costs - self.apart) / self.slot
        if self.bridged:
            return paid
        return np.where(costs >= self.all_cost - CLOSE, 1.0, np.minimum(paid, self.curve.shares[-1]))

    def damage(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Damage `(heads, m)` at every one of `costs` `(m,)`; inf where protected tokens do not fit."""
        shares, falling = self.share(costs), self.curve.falling()
        last, curve = falling.shares[-1], np.full((len(falling.damage), len(costs)), np.inf)
        # Rising: what is too little first, then shares one by one, then those that the last measured one or all cost.
        low, high = (int(np.searchsorted(shares, at)) for at in (self.floor - 1e-9, last))
        curve[:, low:high] = falling.at(shares[low:high])
        curve[:, max(low, high) :] = falling.damage[:, -1:]
        beyond = shares[shares > last]
        curve[..., shares > last] = falling.damage[..., -1:] * (1 - beyond) / (1 - last) + self.whole * (
            beyond - last
        ) / (1 - last)
        curve[:, :low] = np.inf
        return curve

    def in_groups(self, groups: int) -> Self:
        """The same choice for `groups` groups of heads that get it together: their damage is the sum."""
        curve = self.curve.damage.reshape(groups, -1, self.curve.damage.shape[-1]).sum(axis=1)
        whole = self.whole
        if isinstance(whole, np.ndarray):
            whole = whole.reshape(groups, -1, 1).sum(axis=1)
        return replace(self, curve=Curve(self.curve.shares, curve), whole=whole)


@dataclass(frozen=True)
class Envelope:
    """For every cost of a rising grid `(m,)` the least damage `(heads, m)` it buys, and the choice `(heads, m)` that does."""

    costs: NDArray[np.float64]
    damage: NDArray[np.float64]
    choice: NDArray[np.int64]
    choices: Sequence[Choice]


def lower_envelope(choices: Sequence[Choice], steps: int, cap: float | None = None) -> Envelope:
    """The best of the choices at every cost up to `cap`, otherwise up to what all tokens cost at the most.

    On a grid of `steps` to 1 and of what all tokens cost by each choice. Ties go to the earlier choice.
    """
    cap = max(choice.all_cost for choice in choices) if cap is None else cap
    lowest = min(choice.least_cost for choice in choices)
    grid = np.arange(1, steps + 1) / steps
    costs = np.unique(np.concatenate([[lowest], grid[(grid > lowest) & (grid < cap)], [cap]]))
    whole = np.unique([choice.all_cost for choice in choices if lowest < choice.all_cost < cap])
    apart = [cost for cost in whole if np.abs(costs - cost).min() > CLOSE]
    costs = np.unique(np.concatenate([costs, apart]))
    heads = len(choices[0].curve.damage)
    least, best = np.full((heads, len(costs)), np.inf), np.zeros((heads, len(costs)), dtype=np.int64)
    for index, choice in enumerate(choices):
        damage = choice.damage(costs)
        better = damage < least
        np.copyto(least, damage, where=better)
        np.copyto(best, index, where=better)
    return Envelope(costs, least, best, choices)
