"""Shares by a rule that does not go by damage: the same for all, one threshold for all, or as published."""

import numpy as np

from kvprofile.errors import UsageError
from kvprofile.names import AUTO
from kvprofile.planning.evidence import Decision, Evidence, decision
from kvprofile.planning.objectives import best_single
from kvprofile.planning.reach import check_reach
from kvprofile.planning.rules import PUBLISHED, rule_shares
from kvprofile.planning.sizes import Pair
from kvprofile.planning.solve import solve


def by_rule(evidence: Evidence, rule: str, budget: float, pair: Pair) -> Decision:
    """Every head's share under one policy: the one asked for, or the best one where every head keeps the budget.

    All heads are stored by `pair`, the codecs of keys and values.

    Raises UsageError where the rule cannot be followed, MismatchError where the budget is out of reach.
    """
    name = evidence.policy
    if name == AUTO:
        name = best_single(evidence.statistics, evidence.curves, budget)
    policies = np.full(evidence.size, name)
    if rule in PUBLISHED:
        least = evidence.protected(name)
        layers = rule_shares(rule, evidence.measured or {}, evidence.merged, budget, floor=least)
        return decision(np.repeat(layers[:, None], evidence.model.kv_heads, axis=1), policies, [pair])
    if evidence.policies[name].affinity == "cosine":
        found = solve(evidence.thresholds, evidence.ratios, budget, rule=rule, granularity=evidence.granularity)
        return decision(found.share, policies, [pair])
    if rule == "common":
        raise UsageError(f"the policy {name} goes by {evidence.policies[name].affinity}, which has no common threshold")
    check_reach(budget, evidence.protected(name))
    return decision(np.full(evidence.size, budget), policies, [pair])
