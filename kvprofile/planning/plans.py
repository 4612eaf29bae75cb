"""From measured statistics and a budget to the plan a profile carries."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import MismatchError, UsageError
from kvprofile.names import AUTO, BUDGET_RULES, GRANULARITIES, MODES
from kvprofile.planning.allocate import Envelope, lower_envelope, spend
from kvprofile.planning.rules import PUBLISHED, rule_shares
from kvprofile.planning.solve import check_budget, interpolate, solve, thresholds_of
from kvprofile.profile.schema import (
    HeadPlan,
    LayerPlan,
    ModelFacts,
    Plan,
    PolicyFacts,
    Profile,
    ProtectionFacts,
    Statistics,
)

OBJECTIVES = {
    "balanced": {"recall": 1.0, "continuation": 1.0},
    "recall": {"recall": 1.0},
    "continuation": {"continuation": 1.0},
    "all": {"recall": 1.0, "continuation": 1.0, "facts": 1.0, "lookup": 1.0},
}


@dataclass(frozen=True)
class Decision:
    """What every head of the merged layers gets, all `(layers, kv_heads)`: share of the slots, policy, predicted damage.

    bound: no allocation of the budget predicts less damage. `damage` and `bound` are None where they are not known.
    """

    share: NDArray[np.float64]
    policy: NDArray[np.str_]
    damage: NDArray[np.float64] | None
    bound: float | None


@dataclass(frozen=True, eq=False)
class Solver:
    """What a profile's statistics say of any budget; what does not hang on the budget is worked out once.

    `damage` is the arrays' `damage_mean`, `(layers, policies, kv_heads, budgets, kinds)`, needed for the rule `damage` and to
    choose a policy; `tokens` the length it was measured at. `measured` are all arrays: the published rules go by them.

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

    def __post_init__(self) -> None:
        _known("rule", self.rule, BUDGET_RULES)
        _known("objective", self.objective, tuple(OBJECTIVES))
        _known("granularity", self.granularity, GRANULARITIES)
        _known("mode", self.mode, MODES)
        _known("policy", self.policy, (AUTO, *self.policies))
        if self.tokens < 1 or not self.statistics.thresholds:
            raise MismatchError(
                f"nothing was measured of {self.model.name}, so nothing can be planned by it; calibrate it first"
            )
        if not self.model.full_attention_layers():
            raise MismatchError(
                f"{self.model.name} has no full-attention layer, so there is nothing to merge; use its stock cache"
            )

    def plan(self, budget: float) -> Plan:
        """The plan for a budget.

        Raises UsageError for a budget or setting that cannot be used, MismatchError with the reachable range where the
        budget is out of reach.
        """
        found = self.decide(budget)
        share = found.share
        epsilon = np.where(self._cosine(found.policy), thresholds_of(self._thresholds, self._ratios, share), np.inf)
        whole = thresholds_of(self._thresholds, self._ratios.mean(axis=1), share.mean(axis=1))
        return Plan(
            budget=budget,
            policy=self.policy,
            rule=self.rule,  # type: ignore[arg-type]
            objective=self.objective,  # type: ignore[arg-type]
            granularity=self.granularity,  # type: ignore[arg-type]
            mode=self.mode,  # type: ignore[arg-type]
            predicted_ratio=round(float(share.mean()), 6),
            predicted_damage=total(found),
            damage_bound=None if found.bound is None else _four_digits(found.bound),
            layers=[
                LayerPlan(
                    layer=layer,
                    epsilon=_finite(whole[row]),
                    share=round(float(share[row].mean()), 6),
                    heads=[
                        HeadPlan(
                            policy=str(found.policy[row, head]),
                            epsilon=_finite(epsilon[row, head]),
                            share=round(float(share[row, head]), 6),
                            damage=None if found.damage is None else _four_digits(found.damage[row, head]),
                        )
                        for head in range(self.model.kv_heads)
                    ],
                )
                for row, layer in enumerate(self._merged)
            ],
        )

    def decide(self, budget: float) -> Decision:
        """Every head's share and policy; raises as `plan` does."""
        check_budget(budget)
        share, chosen, bound = self._by_damage(budget) if self.rule == "damage" else self._by_rule(budget)
        if self.mode == "threshold" and not (self._cosine(chosen) | (share >= 1)).all():
            raise UsageError(
                "threshold mode needs policies that go by cosine in every head; give for example --policy gauss, or use exact "
                "mode"
            )
        predicted = None if self._cost is None else _predict(self._cost, self.statistics, chosen, share)
        return Decision(share, chosen, predicted, bound)

    def _by_damage(self, budget: float) -> tuple[NDArray[np.float64], NDArray[np.str_], float]:
        names, envelope = self._names, self._envelope
        found = spend(envelope, budget)
        heads = 1 if self.granularity == "head" else self.model.kv_heads
        share = np.repeat(found.share, heads).reshape(self._size)
        return share, np.array(names)[np.repeat(found.policy, heads)].reshape(self._size), found.bound

    def _by_rule(self, budget: float) -> tuple[NDArray[np.float64], NDArray[np.str_], None]:
        name = self.policy
        if name == AUTO:
            name = _best_single(self.statistics, self._cost, budget)
        share = np.full(self._size, budget)
        least = self._protected(name)
        if self.rule in PUBLISHED:
            layers = rule_shares(self.rule, self.measured or {}, self._merged, budget, floor=least)
            share = np.repeat(layers[:, None], self.model.kv_heads, axis=1)
        elif self.policies[name].affinity == "cosine":
            share = solve(self._thresholds, self._ratios, budget, rule=self.rule, granularity=self.granularity).share
        elif self.rule == "common":
            raise UsageError(f"the policy {name} goes by {self.policies[name].affinity}, which has no common threshold")
        elif budget < least:
            raise MismatchError(
                f"budget {budget:g} is out of reach: protected tokens keep at least {least:.3f} of the slots of every head; "
                f"ask for a budget from {math.ceil(least * 1000) / 1000:.3f} to 1"
            )
        return share, np.full(self._size, name), None

    @cached_property
    def _merged(self) -> list[int]:
        return self.model.full_attention_layers()

    @property
    def _size(self) -> tuple[int, int]:
        return len(self._merged), self.model.kv_heads

    @cached_property
    def _thresholds(self) -> NDArray[np.float64]:
        return np.array(self.statistics.thresholds)

    @cached_property
    def _ratios(self) -> NDArray[np.float64]:
        return np.array([self.statistics.layers[layer].ratio for layer in self._merged])

    @cached_property
    def _cost(self) -> NDArray[np.float64] | None:
        if self.damage is None or self.statistics.damage is None:
            return None
        return damage_curves(self.damage, self.statistics, self.objective)

    @cached_property
    def _names(self) -> list[str]:
        """The policies among which damage chooses."""
        if self._cost is None or self.statistics.damage is None:
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

    @cached_property
    def _envelope(self) -> Envelope:
        names, measured = self._names, self.statistics.damage
        assert self._cost is not None  # there are names
        assert measured is not None
        curves = self._cost[:, [measured.policies.index(name) for name in names]].transpose(0, 2, 1, 3)
        curves = curves.sum(axis=1) if self.granularity == "layer" else curves.reshape(-1, *curves.shape[2:])
        floor = np.array([self._protected(name) for name in names])
        return lower_envelope(np.array(measured.budgets), curves, floor, 1.0)

    def _protected(self, name: str) -> float:
        return protected_share(self.policies[name].protection, self.tokens)

    def _cosine(self, chosen: NDArray[np.str_]) -> NDArray[np.bool_]:
        return np.isin(chosen, [name for name, facts in self.policies.items() if facts.affinity == "cosine"])


def make_plan(
    model: ModelFacts,
    policies: dict[str, PolicyFacts],
    statistics: Statistics,
    damage: NDArray[np.floating] | None,
    budget: float,
    *,
    tokens: int,
    **choices: Any,
) -> Plan:
    """Solve for a budget from a profile's statistics; the model itself is not needed.

    The arguments are those of `Solver`; raises as it and its `plan` do.
    """
    check_budget(budget)
    return Solver(model, policies, statistics, damage, tokens, **choices).plan(budget)


def solver_of(
    profile: Profile,
    damage: NDArray[np.floating] | None,
    *,
    policy: str | None = None,
    rule: str | None = None,
    measured: Mapping[str, NDArray[np.generic]] | None = None,
    objective: str | None = None,
    granularity: str | None = None,
    mode: str | None = None,
) -> Solver:
    """The solver for a profile; what is not given is as in its plan. A `policy` may be one it does not hold yet."""
    policies = profile.policies
    if policy is not None and policy not in (AUTO, *policies):
        policies = policies | _by_name(policy)
    return Solver(
        profile.model,
        policies,
        profile.statistics,
        damage,
        tokens=profile.calibration.measured.tokens,
        policy=policy or profile.plan.policy,
        rule=rule or profile.plan.rule,
        measured=measured,
        objective=objective or profile.plan.objective,
        granularity=granularity or profile.plan.granularity,
        mode=mode or profile.plan.mode,
    )


def replan(
    profile: Profile,
    damage: NDArray[np.floating] | None,
    budget: float,
    *,
    policy: str | None = None,
    rule: str | None = None,
    measured: Mapping[str, NDArray[np.generic]] | None = None,
    objective: str | None = None,
    granularity: str | None = None,
    mode: str | None = None,
) -> Profile:
    """The same profile with a plan for another budget; what is not given stays as it was.

    `damage` and `measured` are as in `Solver`. A `policy` may also be one that the profile does not hold yet. The check is
    dropped: it was measured for the old plan.
    """
    check_budget(budget)
    solver = solver_of(
        profile,
        damage,
        policy=policy,
        rule=rule,
        measured=measured,
        objective=objective,
        granularity=granularity,
        mode=mode,
    )
    return profile.model_copy(update={"policies": solver.policies, "plan": solver.plan(budget), "check": None})


def _by_name(policy: str) -> dict[str, PolicyFacts]:
    """A policy the package knows, under its name; nothing where it knows none.

    Raises UsageError for a policy whose thresholds only its own calibration can tell.
    """
    from kvprofile.merging.policies import POLICIES

    if policy not in POLICIES:
        return {}
    if POLICIES[policy].rule in ("anchor", "complete"):
        raise UsageError(
            f"the profile was calibrated without {policy}, whose sets need thresholds of their own; calibrate with "
            f"--policy {policy}"
        )
    return {policy: PolicyFacts.model_validate(POLICIES[policy].to_dict())}


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")


def damage_curves(damage: NDArray[np.floating], statistics: Statistics, objective: str) -> NDArray[np.float64]:
    """The objective's sum over kinds of probe: `(layers, policies, kv_heads, budgets)`."""
    kinds = statistics.damage.kinds if statistics.damage is not None else []
    weights = OBJECTIVES[objective]
    if missing := weights.keys() - set(kinds):
        raise UsageError(
            f"the objective {objective} needs probes of {', '.join(sorted(weights))}, and none of {', '.join(sorted(missing))} "
            "were measured; choose another, or calibrate anew with --probes, for example --probes facts=4,lookups=8"
        )
    return damage.astype(np.float64) @ np.array([weights.get(kind, 0.0) for kind in kinds])


def _predict(
    cost: NDArray[np.float64], statistics: Statistics, chosen: NDArray[np.str_], share: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Damage of every head `(layers, kv_heads)` at its share; None where a policy's damage was not measured."""
    assert statistics.damage is not None  # the caller has curves
    names = statistics.damage.policies
    if not set(chosen.ravel().tolist()) <= set(names):
        return None
    index = np.vectorize(names.index, otypes=[np.int64])(chosen)
    rows, heads = np.indices(chosen.shape)
    curves = np.concatenate([cost[rows, index, heads], np.zeros((*chosen.shape, 1))], axis=-1)
    return interpolate(share, np.array([*statistics.damage.budgets, 1.0]), curves)


def _best_single(statistics: Statistics, cost: NDArray[np.float64] | None, budget: float) -> str:
    """The policy with the least predicted damage if every head keeps the budget."""
    if cost is None or statistics.damage is None:
        return statistics.policy
    budgets = [*statistics.damage.budgets, 1.0]
    totals = np.append(cost.sum(axis=(0, 2)), np.zeros((cost.shape[1], 1)), axis=1)
    return statistics.damage.policies[int(np.argmin([np.interp(budget, budgets, total) for total in totals]))]


def total(decision: Decision) -> float | None:
    """Predicted damage of all heads, to four digits as a profile has it."""
    return None if decision.damage is None else _four_digits(decision.damage.sum())


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def protected_share(protection: ProtectionFacts, tokens: int) -> float:
    """The share that protected tokens take of `tokens`."""
    recent = max(protection.recent, math.ceil(protection.recent_share * tokens))
    return min(1.0, (protection.first + recent + math.ceil(protection.heavy_share * tokens)) / tokens)


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else round(float(epsilon), 6)
