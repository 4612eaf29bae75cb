"""Shares and policies by measured damage: the rule `damage`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.allocate import STEPS, check_slots, spend
from kvprofile.planning.choices import Choice, Curve, Envelope, lower_envelope
from kvprofile.planning.evidence import Decision, Evidence


def slots_envelope(evidence: Evidence) -> Envelope:
    """What every share of the slots does at least, of every head or, where layers share alike, of every layer."""
    measured, curves = evidence.statistics.damage, evidence.curves
    names = evidence.names
    assert measured is not None  # there are names
    assert curves is not None
    of_policies = curves.transpose(0, 2, 1, 3).reshape(-1, *curves.shape[1:2], curves.shape[3])
    choices = policy_choices(
        np.array(measured.budgets),
        of_policies[:, [measured.policies.index(name) for name in names]],
        [evidence.protected(name) for name in names],
    )
    if evidence.granularity == "layer":
        choices = [choice.in_groups(evidence.size[0]) for choice in choices]
    return lower_envelope(choices, STEPS)


def policy_choices(budgets: NDArray[np.float64], damage: NDArray[np.float64], floors: Sequence[float]) -> list[Choice]:
    """One choice for every policy of `damage` `(heads, policies, budgets)`, in whose slots a share costs itself."""
    return [Choice(Curve(budgets, damage[:, index]), float(floor)) for index, floor in enumerate(floors)]


def by_damage(evidence: Evidence, envelope: Envelope, budget: float) -> Decision:
    """Every head's share and policy for the least damage. Raises MismatchError where the budget is out of reach."""
    check_slots(envelope, budget)
    found = spend(envelope, budget)
    heads = 1 if evidence.granularity == "head" else evidence.model.kv_heads
    share = np.repeat(found.share, heads).reshape(evidence.size)
    chosen = np.repeat(found.choice, heads).reshape(evidence.size)
    return Decision(share, np.array(evidence.names)[chosen], bound=found.bound)
