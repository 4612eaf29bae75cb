"""What a profile holds for the solver, and what follows from it whatever the budget: worked out once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import MismatchError, UsageError
from kvprofile.names import AUTO
from kvprofile.planning.objectives import codec_curves, damage_curves
from kvprofile.planning.sizes import Pair
from kvprofile.profile.schema import ModelFacts, PolicyFacts, ProtectionFacts, Statistics


@dataclass(frozen=True)
class Decision:
    """What every head of the merged layers gets, all `(layers, kv_heads)`: share of the slots, policy, codecs.

    damage: predicted, and of it `codec_damage` by the codecs. bound: no allocation of the budget predicts less damage. windows:
    codecs of the heads of sliding layers, one after the other; none: as they are. window_damage: what these do. What is not
    known is None.
    """

    share: NDArray[np.float64]
    policy: NDArray[np.str_]
    key_codec: NDArray[np.str_]
    value_codec: NDArray[np.str_]
    damage: NDArray[np.float64] | None = None
    codec_damage: NDArray[np.float64] | None = None
    bound: float | None = None
    windows: tuple[Pair, ...] = ()
    window_damage: NDArray[np.float64] | None = None

    @property
    def pairs(self) -> list[Pair]:
        """Codecs of keys and values, head by head."""
        return list(zip(self.key_codec.ravel().tolist(), self.value_codec.ravel().tolist(), strict=True))


def decision(
    share: NDArray[np.float64], policy: NDArray[np.str_], pairs: Sequence[Pair], bound: float | None = None
) -> Decision:
    """A decision of which no damage is predicted yet; `pairs` are the codecs of every head, or of all."""
    every = list(pairs) * (share.size // len(pairs))
    keys, values = (np.array(codecs).reshape(share.shape) for codecs in zip(*every, strict=True))
    return Decision(share, policy, keys, values, bound=bound)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured, and the settings that say how to read it.

    `damage` is the arrays' `damage_mean`, `(layers, policies, kv_heads, budgets, kinds)`, needed for the rule `damage` and to
    choose a policy; `tokens` the length it was measured at. `measured` are all arrays: the published rules go by them.
    """

    model: ModelFacts
    policies: dict[str, PolicyFacts]
    statistics: Statistics
    damage: NDArray[np.floating] | None
    tokens: int
    policy: str
    measured: Mapping[str, NDArray[np.generic]] | None
    objective: str
    granularity: str

    def check(self) -> None:
        """Raise MismatchError where nothing was measured, or nothing can be merged."""
        if self.tokens < 1 or not self.statistics.thresholds:
            raise MismatchError(
                f"nothing was measured of {self.model.name}, so nothing can be planned by it; calibrate it first"
            )
        if not self.model.full_attention_layers():
            raise MismatchError(
                f"{self.model.name} has no full-attention layer, so there is nothing to merge; use its stock cache"
            )

    @cached_property
    def merged(self) -> list[int]:
        """Indices of the layers that are merged."""
        return self.model.full_attention_layers()

    @property
    def size(self) -> tuple[int, int]:
        """Layers that are merged, and KV heads of each."""
        return len(self.merged), self.model.kv_heads

    @cached_property
    def thresholds(self) -> NDArray[np.float64]:
        """At which the ratios were measured."""
        return np.array(self.statistics.thresholds)

    @cached_property
    def ratios(self) -> NDArray[np.float64]:
        """Share of slots `(layers, kv_heads, thresholds)` at every threshold."""
        return np.array([self.statistics.layers[layer].ratio for layer in self.merged])

    @cached_property
    def curves(self) -> NDArray[np.float64] | None:
        """The objective's damage `(layers, policies, kv_heads, budgets)`; None where none was measured or is at hand."""
        if self.damage is None or self.statistics.damage is None:
            return None
        return damage_curves(self.damage, self.statistics, self.objective)

    @cached_property
    def codec_curves(self) -> list[NDArray[np.float64]]:
        """What codecs of keys do, and of values: `(layers, policies, kv_heads, shares, codecs)` each, the objective's sum.

        Raises UsageError where the arrays are not at hand.
        """
        return codec_curves(self.measured or {}, self.statistics, self.objective)

    @cached_property
    def names(self) -> list[str]:
        """The policies among which damage chooses."""
        if self.curves is None or self.statistics.damage is None:
            raise UsageError(
                "no damage was measured, so no budget can be spent by it; give --rule uniform, or calibrate anew"
            )
        names = [name for name in self.statistics.damage.policies if self.policy in (AUTO, name)]
        if not names:
            raise UsageError(
                f"damage was measured for {', '.join(self.statistics.damage.policies)}, not for {self.policy}; choose one of "
                "them or --rule uniform"
            )
        return names

    def protected(self, name: str) -> float:
        """The share that a policy's protected tokens take."""
        return protected_share(self.policies[name].protection, self.tokens)


def protected_share(protection: ProtectionFacts, tokens: int) -> float:
    """The share that protected tokens take of `tokens`."""
    recent = max(protection.recent, math.ceil(protection.recent_share * tokens))
    return min(1.0, (protection.first + recent + math.ceil(protection.heavy_share * tokens)) / tokens)
