"""Sliding layers in a plan for bytes: every token that the window sees stays, in as many bits as do least damage for the bytes.

A head of theirs has a cost and a damage for every pair of codecs, and no shares. It stands beside the heads of merged layers as
a row more of what a cost buys; costs are in the same unit, a token of all that were calibrated with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvprofile.names import NO_CODEC
from kvprofile.planning.choices import CLOSE, Choice, Curve, Envelope
from kvprofile.planning.evidence import Evidence
from kvprofile.planning.objectives import window_curves
from kvprofile.planning.sizes import Pair, Sizes


@dataclass(frozen=True, eq=False)
class Windows:
    """The sliding layers of which codecs were measured, and the `pairs` that their heads may be stored by.

    layers: their indices.
    """

    evidence: Evidence
    sizes: Sizes
    pairs: Sequence[Pair]

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the layers."""
        measured = self.evidence.statistics.damage
        return [] if measured is None else measured.windows

    @property
    def heads(self) -> int:
        """KV heads of all of them."""
        return len(self.layers) * self.evidence.model.kv_heads

    @property
    def held(self) -> int:
        """Tokens that the stock cache holds of each."""
        return min(self.evidence.tokens, (self.evidence.model.window or 1) - 1)

    @property
    def unit(self) -> float:
        """What a head takes in the stock cache of a 16-bit model, over what one of a full-attention layer does."""
        return self.held / self.evidence.tokens

    def part(self, merged: int) -> float:
        """What all heads, `merged` ones of full-attention layers among them, take on average in that cache."""
        return (merged + self.heads * self.unit) / (merged + self.heads)

    def cost(self, pair: Pair) -> float:
        """What a head takes by a pair of codecs."""
        return self.sizes.window_bytes(self.evidence.model.window or 1, [pair]) / (
            self.sizes.stock * self.evidence.tokens
        )

    def damage(self, pair: Pair) -> NDArray[np.float64]:
        """What a pair of codecs does to every head `(heads,)`."""
        measured, found = self.evidence.statistics.damage, np.zeros(self.heads)
        assert measured is not None  # there are layers
        for curves, codec in zip(self._curves, pair, strict=True):
            if codec != NO_CODEC:
                found = found + curves[:, :, measured.codecs.index(codec)].ravel()
        return found

    def damage_of(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """What every head's own pair does to it `(heads,)`."""
        known = {pair: self.damage(pair) for pair in set(pairs)}
        return np.array([known[pair][head] for head, pair in enumerate(pairs)])

    def nbytes(self, pairs: Sequence[Pair], sizes: Sizes) -> float:
        """Bytes of one text's cache of such sizes in these layers, their heads stored by these pairs, one after the other."""
        count, window = self.evidence.model.kv_heads, self.evidence.model.window or 1
        every = [pairs[low : low + count] for low in range(0, len(pairs), count)]
        return sum(sizes.window_bytes(window, own) for own in every)

    def beside(self, merged: Envelope, groups: int) -> Envelope:
        """What every cost buys heads of merged layers, and below them, as rows, the heads of these in `groups` groups."""
        own = [_stored(self.cost(pair), self.damage(pair)).in_groups(groups) for pair in self.pairs]
        costs = np.unique(np.concatenate([merged.costs, [choice.all_cost for choice in own]]))
        place = np.searchsorted(merged.costs, costs + CLOSE, side="right") - 1
        damage = np.where(place < 0, np.inf, merged.damage[:, np.maximum(place, 0)])
        every = np.stack([choice.damage(costs) for choice in own])
        best, first = every.argmin(axis=0), len(merged.choices)
        return Envelope(
            costs,
            np.concatenate([damage, every.min(axis=0)]),
            np.concatenate([merged.choice[:, np.maximum(place, 0)], first + best]),
            [*merged.choices, *own],
        )

    def within(self, choice: Choice, pair: Pair, merged: int) -> Choice:
        """A choice for all heads alike, `merged` ones of full-attention layers, with these stored by the same pair.

        Its costs are then fractions of what all take in the stock cache.
        """
        total = merged + self.heads * self.unit
        ours, harm = self.heads * self.cost(pair) / total, self.damage(pair).sum()
        return replace(
            choice,
            curve=Curve(choice.curve.shares, choice.curve.damage + harm),
            whole=choice.whole + harm,
            slot=choice.slot * merged / total,
            apart=choice.apart * merged / total + ours,
            all_cost=choice.all_cost * merged / total + ours,
        )

    @cached_property
    def _curves(self) -> list[NDArray[np.float64]]:
        return window_curves(self.evidence.measured or {}, self.evidence.statistics, self.evidence.objective)


def _stored(cost: float, damage: NDArray[np.float64]) -> Choice:
    """All tokens at one cost: a share of 1 from there on, and nothing below."""
    rows = damage[:, None]
    return Choice(Curve(np.ones(1), rows), 1.0, rows, 1.0, cost - 1.0, cost, bridged=False)
