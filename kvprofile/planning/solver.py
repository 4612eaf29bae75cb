"""The solver: what a profile's statistics say of any budget, in slots or in bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.names import AUTO, BUDGET_RULES, GRANULARITIES, MODES, NO_CODEC
from kvprofile.planning.by_damage import ByDamage
from kvprofile.planning.by_rule import by_rule
from kvprofile.planning.codecs import codec_damage, pairs_of
from kvprofile.planning.evidence import Decision, Evidence
from kvprofile.planning.objectives import OBJECTIVES, predict
from kvprofile.planning.reach import check_budget, check_bytes
from kvprofile.planning.sizes import NOTHING, Pair
from kvprofile.planning.solve import thresholds_of
from kvprofile.profile.schema import (
    HeadPlan,
    LayerPlan,
    ModelFacts,
    Plan,
    PolicyFacts,
    Statistics,
    WindowHead,
    WindowPlan,
)


@dataclass(frozen=True, eq=False)
class Solver:
    """What a profile's statistics say of any budget; what does not hang on the budget is worked out once.

    The arguments are those of `Evidence`, and how the budget is spent. in_bytes: an amount is a fraction of the merged layers'
    bytes in a 16-bit cache, otherwise of their slots. codec: `none`, `auto`, a codec or `KEYS/VALUES`.

    Raises UsageError for an argument that cannot be used, MismatchError where nothing can be merged.
    """

    model: ModelFacts
    policies: dict[str, PolicyFacts]
    statistics: Statistics
    damage: NDArray[np.floating] | None
    tokens: int
    policy: str = AUTO
    rule: str = "damage"
    measured: Mapping[str, NDArray[np.generic]] | None = None
    objective: str = "balanced"
    granularity: str = "head"
    mode: str = "exact"
    codec: str = NO_CODEC
    in_bytes: bool = False

    def __post_init__(self) -> None:
        _known("rule", self.rule, BUDGET_RULES)
        _known("objective", self.objective, tuple(OBJECTIVES))
        _known("granularity", self.granularity, GRANULARITIES)
        _known("mode", self.mode, MODES)
        _known("policy", self.policy, (AUTO, *self.policies))
        self.evidence.check()
        if self.in_bytes and self.rule not in ("damage", "uniform"):
            raise UsageError(
                f"the rule {self.rule} deals out slots; bytes are spent by --rule damage or uniform, or give --budget"
            )

    @cached_property
    def evidence(self) -> Evidence:
        """What was measured."""
        return Evidence(
            self.model,
            self.policies,
            self.statistics,
            self.damage,
            self.tokens,
            self.policy,
            self.measured,
            self.objective,
            self.granularity,
        )

    def plan(self, amount: float) -> Plan:
        """The plan for a fraction of the slots, or of the bytes.

        Raises UsageError for an amount or setting that cannot be used, MismatchError with the reachable range where the
        amount is out of reach.
        """
        found, evidence = self.decide(amount), self.evidence
        share = found.share
        cosine = self._cosine(found.policy)
        epsilon = np.where(cosine, thresholds_of(evidence.thresholds, evidence.ratios, share), np.inf)
        whole = thresholds_of(evidence.thresholds, evidence.ratios.mean(axis=1), share.mean(axis=1))
        ratio = round(float(share.mean()), 6)
        return Plan(
            budget=ratio if self.in_bytes else amount,
            bytes=amount if self.in_bytes else None,
            policy=self.policy,
            codec=self.codec,
            rule=self.rule,  # type: ignore[arg-type]
            objective=self.objective,  # type: ignore[arg-type]
            granularity=self.granularity,  # type: ignore[arg-type]
            mode=self.mode,  # type: ignore[arg-type]
            predicted_ratio=ratio,
            predicted_bytes=round(self._sized.size(found), 6),
            predicted_damage=total(found),
            predicted_codec_damage=None
            if found.codec_damage is None
            else _four_digits(found.codec_damage.sum() + _of_windows(found)),
            damage_bound=None if found.bound is None else _four_digits(found.bound),
            layers=[
                LayerPlan(
                    layer=layer,
                    epsilon=_finite(whole[row]),
                    share=round(float(share[row].mean()), 6),
                    heads=[_head(found, epsilon, (row, head)) for head in range(self.model.kv_heads)],
                )
                for row, layer in enumerate(evidence.merged)
            ],
            windows=_windows(found, self._sized.windows.layers),
        )

    def decide(self, amount: float) -> Decision:
        """Every head's share, policy and codecs; raises as `plan` does."""
        (check_bytes if self.in_bytes else check_budget)(amount)
        evidence = self.evidence
        by_damage = self.in_bytes or self.rule == "damage"
        if by_damage:
            found = self._sized.decide(amount)
        else:
            found = by_rule(evidence, self.rule, amount, self._pairs[0])
            found = replace(found, windows=(self._pairs[0],) * self._sized.windows.heads)
        if self.mode == "threshold" and not (self._cosine(found.policy) | (found.share >= 1)).all():
            raise UsageError(
                "threshold mode needs policies that go by cosine in every head; give for example --policy gauss, or use exact "
                "mode"
            )
        if evidence.curves is None:
            return found
        damage = predict(evidence.curves, self.statistics, found.policy, found.share)
        if damage is None:
            return found
        coded, passing = codec_damage(evidence, found), self._sized.windows.damage_of(found.windows)
        return replace(found, damage=damage + coded, codec_damage=coded, window_damage=passing)

    @cached_property
    def _pairs(self) -> list[Pair]:
        return pairs_of(self.codec, self.evidence, in_bytes=self.in_bytes)

    @cached_property
    def _sized(self) -> ByDamage:
        return ByDamage(self.evidence, self._pairs, self.in_bytes, alike=self.in_bytes and self.rule == "uniform")

    def _cosine(self, chosen: NDArray[np.str_]) -> NDArray[np.bool_]:
        return np.isin(chosen, [name for name, facts in self.policies.items() if facts.affinity == "cosine"])


def _head(found: Decision, epsilon: NDArray[np.float64], place: tuple[int, int]) -> HeadPlan:
    return HeadPlan(
        policy=str(found.policy[place]),
        epsilon=_finite(epsilon[place]),
        share=round(float(found.share[place]), 6),
        damage=None if found.damage is None else _four_digits(found.damage[place]),
        key_codec=str(found.key_codec[place]),
        value_codec=str(found.value_codec[place]),
        codec_damage=None if found.codec_damage is None else _four_digits(found.codec_damage[place]),
    )


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")


def total(decision: Decision) -> float | None:
    """Predicted damage of all heads, to four digits as a profile has it."""
    return None if decision.damage is None else _four_digits(decision.damage.sum() + _of_windows(decision))


def _of_windows(decision: Decision) -> float:
    return 0.0 if decision.window_damage is None else float(decision.window_damage.sum())


def _windows(found: Decision, layers: list[int]) -> list[WindowPlan]:
    """What of the sliding layers is packed: those of which every head stays as it is are left out."""
    planned, heads = [], len(found.windows) // max(1, len(layers))
    for row, layer in enumerate(layers if found.windows else []):
        own = range(row * heads, (row + 1) * heads)
        if any(found.windows[head] != NOTHING for head in own):
            planned.append(WindowPlan(layer=layer, heads=[_window(found, head) for head in own]))
    return planned


def _window(found: Decision, head: int) -> WindowHead:
    keys, values = found.windows[head]
    damage = None if found.window_damage is None else _four_digits(found.window_damage[head])
    return WindowHead(key_codec=keys, value_codec=values, damage=damage)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else round(float(epsilon), 6)
