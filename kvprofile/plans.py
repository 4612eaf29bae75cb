"""From measured statistics and a budget to the plan a profile carries."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvprofile.allocate import allocate
from kvprofile.errors import MismatchError, UsageError
from kvprofile.profile import (
    MODES,
    HeadPlan,
    LayerPlan,
    ModelFacts,
    Plan,
    PolicyFacts,
    Profile,
    ProtectionFacts,
    Statistics,
)
from kvprofile.rules import PUBLISHED, rule_shares
from kvprofile.solve import GRANULARITIES, check_budget, solve, thresholds_of

AUTO = "auto"
RULES = ("damage", "uniform", "common", *PUBLISHED)
OBJECTIVES = {
    "balanced": {"recall": 1.0, "continuation": 1.0},
    "recall": {"recall": 1.0},
    "continuation": {"continuation": 1.0},
    "all": {"recall": 1.0, "continuation": 1.0, "facts": 1.0, "lookup": 1.0},
}


def make_plan(
    model: ModelFacts,
    policies: dict[str, PolicyFacts],
    statistics: Statistics,
    damage: NDArray[np.floating] | None,
    budget: float,
    *,
    tokens: int,
    policy: str = AUTO,
    rule: str = "damage",
    measured: Mapping[str, NDArray[np.generic]] | None = None,
    objective: str = "balanced",
    granularity: str = "head",
    mode: str = "exact",
) -> Plan:
    """Solve for a budget from a profile's statistics; the model itself is not needed.

    `damage` is the arrays' `damage_mean`, `(layers, policies, kv_heads, budgets, kinds)`, needed for the rule `damage` and to
    choose a policy; `tokens` the length it was measured at. `measured` are all arrays: the published rules go by them.

    Raises UsageError for an argument that cannot be used, MismatchError with the reachable range where the budget is out
    of reach.
    """
    check_budget(budget)
    _known("rule", rule, RULES)
    _known("objective", objective, tuple(OBJECTIVES))
    _known("granularity", granularity, GRANULARITIES)
    _known("mode", mode, MODES)
    _known("policy", policy, (AUTO, *policies))
    if tokens < 1 or not statistics.thresholds:
        raise MismatchError(
            f"nothing was measured of {model.name}, so nothing can be planned by it; calibrate it first"
        )
    merged = model.full_attention_layers()
    if not merged:
        raise MismatchError(
            f"{model.name} has no full-attention layer, so there is nothing to merge; use its stock cache"
        )
    size = (len(merged), model.kv_heads)
    ratios = np.array([statistics.layers[layer].ratio for layer in merged])
    thresholds = np.array(statistics.thresholds)
    cost = None if damage is None or statistics.damage is None else damage_curves(damage, statistics, objective)
    bound = None
    if rule == "damage":
        if cost is None or statistics.damage is None:
            raise UsageError(
                "no damage was measured, so no budget can be spent by it; give --rule uniform, or calibrate anew"
            )
        names = [name for name in statistics.damage.policies if policy in (AUTO, name)]
        if not names:
            raise UsageError(
                f"damage was measured for {', '.join(statistics.damage.policies)}, not for {policy}; choose one of them or "
                "--rule uniform"
            )
        index = [statistics.damage.policies.index(name) for name in names]
        curves = cost[:, index].transpose(0, 2, 1, 3)
        curves = curves.sum(axis=1) if granularity == "layer" else curves.reshape(-1, *curves.shape[2:])
        floor = np.array([protected_share(policies[name].protection, tokens) for name in names])
        found = allocate(np.array(statistics.damage.budgets), curves, budget, floor=floor)
        heads = 1 if granularity == "head" else model.kv_heads
        share = np.repeat(found.share, heads).reshape(size)
        chosen = np.array(names)[np.repeat(found.policy, heads)].reshape(size)
        bound = found.bound
    else:
        name = policy if policy != AUTO else _best_single(policies, statistics, cost, budget)
        chosen = np.full(size, name)
        share = np.full(size, budget)
        least = protected_share(policies[name].protection, tokens)
        if rule in PUBLISHED:
            share = np.repeat(rule_shares(rule, measured or {}, merged, budget, floor=least)[:, None], size[1], axis=1)
        elif policies[name].affinity == "cosine":
            share = solve(thresholds, ratios, budget, rule=rule, granularity=granularity).share
        elif rule == "common":
            raise UsageError(f"the policy {name} goes by {policies[name].affinity}, which has no common threshold")
        elif budget < least:
            raise MismatchError(
                f"budget {budget:g} is out of reach: protected tokens keep at least {least:.3f} of the slots of every head; "
                f"ask for a budget from {math.ceil(least * 1000) / 1000:.3f} to 1"
            )
    cosine = np.vectorize(lambda name: policies[name].affinity == "cosine")(chosen)
    if mode == "threshold" and not (cosine | (share >= 1)).all():
        raise UsageError(
            "threshold mode needs policies that go by cosine in every head; give for example --policy gauss, or use exact mode"
        )
    epsilon = np.where(cosine, thresholds_of(thresholds, ratios, share), np.inf)
    predicted = None if cost is None or statistics.damage is None else _predict(cost, statistics, chosen, share)
    return Plan(
        budget=budget,
        policy=policy,
        rule=rule,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        granularity=granularity,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        predicted_ratio=round(float(share.mean()), 6),
        predicted_damage=None if predicted is None else float(f"{predicted.sum():.4g}"),
        damage_bound=None if bound is None else float(f"{bound:.4g}"),
        layers=[
            LayerPlan(
                layer=layer,
                epsilon=_finite(thresholds_of(thresholds, ratios[row].mean(axis=0), share[row].mean()).item()),
                share=round(float(share[row].mean()), 6),
                heads=[
                    HeadPlan(
                        policy=str(chosen[row, head]),
                        epsilon=_finite(epsilon[row, head]),
                        share=round(float(share[row, head]), 6),
                        damage=None if predicted is None else float(f"{predicted[row, head]:.4g}"),
                    )
                    for head in range(model.kv_heads)
                ],
            )
            for row, layer in enumerate(merged)
        ],
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

    `damage` and `measured` are as in `make_plan`. A `policy` may also be one that the profile does not hold yet. The check is
    dropped: it was measured for the old plan.
    """
    policies = profile.policies
    if policy is not None and policy not in (AUTO, *policies):
        policies = policies | _by_name(policy)
    plan = make_plan(
        profile.model,
        policies,
        profile.statistics,
        damage,
        budget,
        tokens=profile.calibration.measured.tokens,
        policy=policy or profile.plan.policy,
        rule=rule or profile.plan.rule,
        measured=measured,
        objective=objective or profile.plan.objective,
        granularity=granularity or profile.plan.granularity,
        mode=mode or profile.plan.mode,
    )
    return profile.model_copy(update={"policies": policies, "plan": plan, "check": None})


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
    if not set(chosen.ravel()) <= set(names):
        return None
    budgets = np.array([*statistics.damage.budgets, 1.0])
    predicted = np.empty(share.shape)
    for (row, head), name in np.ndenumerate(chosen):
        curve = np.append(cost[row, names.index(name), head], 0.0)
        predicted[row, head] = np.interp(share[row, head], budgets, curve)
    return predicted


def _best_single(
    policies: dict[str, PolicyFacts], statistics: Statistics, cost: NDArray[np.float64] | None, budget: float
) -> str:
    """The policy with the least predicted damage if every head keeps the budget."""
    if cost is None or statistics.damage is None:
        return statistics.policy
    budgets = [*statistics.damage.budgets, 1.0]
    totals = np.append(cost.sum(axis=(0, 2)), np.zeros((cost.shape[1], 1)), axis=1)
    return statistics.damage.policies[int(np.argmin([np.interp(budget, budgets, total) for total in totals]))]


def protected_share(protection: ProtectionFacts, tokens: int) -> float:
    """The share that protected tokens take of `tokens`."""
    recent = max(protection.recent, math.ceil(protection.recent_share * tokens))
    return min(1.0, (protection.first + recent + math.ceil(protection.heavy_share * tokens)) / tokens)


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else round(float(epsilon), 6)
