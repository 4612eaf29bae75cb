"""From measured statistics and a budget to the plan a profile carries."""

import math

import numpy as np

from kvprofile.errors import UsageError
from kvprofile.profile import HeadPlan, LayerPlan, ModelFacts, Plan, PolicyFacts, Profile, Statistics
from kvprofile.solve import GRANULARITIES, SHARES, solve


def make_plan(
    model: ModelFacts,
    policies: dict[str, PolicyFacts],
    statistics: Statistics,
    budget: float,
    *,
    shares: str = "uniform",
    granularity: str = "head",
    mode: str = "threshold",
) -> Plan:
    """Solve for a budget from a profile's statistics; the model itself is not needed.

    Raises UsageError for a bad argument, MismatchError with the reachable range where the budget is out of reach.
    """
    for name, value, known in (
        ("shares", shares, SHARES),
        ("granularity", granularity, GRANULARITIES),
        ("mode", mode, ("threshold", "exact")),
    ):
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
    policy_name = statistics.policy
    policy = policies[policy_name]
    if mode == "threshold" and policy.affinity != "cosine":
        raise UsageError(
            f"the policy {policy_name} ranks tokens by {policy.affinity}, for which there are no "
            "thresholds; use exact mode"
        )
    merged = model.full_attention_layers()
    curves = np.array([statistics.layers[layer].ratio for layer in merged])
    solution = solve(np.array(statistics.thresholds), curves, budget, shares=shares, granularity=granularity)
    layers = []
    for row, layer in enumerate(merged):
        heads = [
            HeadPlan(policy=policy_name, epsilon=_finite(epsilon), share=round(float(share), 6))
            for epsilon, share in zip(solution.epsilon[row], solution.share[row], strict=True)
        ]
        layers.append(
            LayerPlan(
                layer=layer,
                epsilon=_finite(solution.layer_epsilon[row]),
                share=round(float(solution.share[row].mean()), 6),
                heads=heads,
            )
        )
    return Plan(
        budget=budget,
        shares=shares,  # type: ignore[arg-type]
        granularity=granularity,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        predicted_ratio=round(solution.ratio, 6),
        layers=layers,
    )


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else round(float(epsilon), 6)


def replan(
    profile: Profile,
    budget: float,
    *,
    shares: str | None = None,
    granularity: str | None = None,
    mode: str | None = None,
) -> Profile:
    """The same profile with a plan for another budget; what is not given stays as it was.

    The check is dropped: it was measured for the old plan.
    """
    plan = make_plan(
        profile.model,
        profile.policies,
        profile.statistics,
        budget,
        shares=shares or profile.plan.shares,
        granularity=granularity or profile.plan.granularity,
        mode=mode or profile.plan.mode,
    )
    return profile.model_copy(update={"plan": plan, "check": None})
