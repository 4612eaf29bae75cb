"""From measured statistics and a budget to the plan a profile carries."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.names import AUTO, BUDGET_RULES, GRANULARITIES, MODES
from kvprofile.planning.by_damage import by_damage, slots_envelope
from kvprofile.planning.by_rule import by_rule
from kvprofile.planning.choices import Envelope
from kvprofile.planning.evidence import Decision, Evidence
from kvprofile.planning.objectives import OBJECTIVES, predict
from kvprofile.planning.reach import check_budget
from kvprofile.planning.solve import thresholds_of
from kvprofile.profile.schema import (
    HeadPlan,
    LayerPlan,
    ModelFacts,
    Plan,
    PolicyFacts,
    Profile,
    Statistics,
)


@dataclass(frozen=True, eq=False)
class Solver:
    """What a profile's statistics say of any budget; what does not hang on the budget is worked out once.

    The arguments are those of `Evidence`, and how the budget is spent.

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
        assert self.evidence is not None  # told now, where there is none

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

    def plan(self, budget: float) -> Plan:
        """The plan for a budget.

        Raises UsageError for a budget or setting that cannot be used, MismatchError with the reachable range where the
        budget is out of reach.
        """
        found, evidence = self.decide(budget), self.evidence
        share = found.share
        epsilon = np.where(
            self._cosine(found.policy), thresholds_of(evidence.thresholds, evidence.ratios, share), np.inf
        )
        whole = thresholds_of(evidence.thresholds, evidence.ratios.mean(axis=1), share.mean(axis=1))
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
                for row, layer in enumerate(evidence.merged)
            ],
        )

    def decide(self, budget: float) -> Decision:
        """Every head's share and policy; raises as `plan` does."""
        check_budget(budget)
        evidence = self.evidence
        damaging = self.rule == "damage"
        found = by_damage(evidence, self._envelope, budget) if damaging else by_rule(evidence, self.rule, budget)
        if self.mode == "threshold" and not (self._cosine(found.policy) | (found.share >= 1)).all():
            raise UsageError(
                "threshold mode needs policies that go by cosine in every head; give for example --policy gauss, or use exact "
                "mode"
            )
        if evidence.curves is None:
            return found
        return replace(found, damage=predict(evidence.curves, self.statistics, found.policy, found.share))

    @cached_property
    def _envelope(self) -> Envelope:
        return slots_envelope(self.evidence)

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


def total(decision: Decision) -> float | None:
    """Predicted damage of all heads, to four digits as a profile has it."""
    return None if decision.damage is None else _four_digits(decision.damage.sum())


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else round(float(epsilon), 6)
