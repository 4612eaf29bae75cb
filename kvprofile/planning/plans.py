"""From measured statistics and a budget to the plan a profile carries."""

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.reach import asked_for
from kvprofile.planning.solver import Solver
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import ModelFacts, Plan, PolicyFacts, Statistics


def make_plan(
    model: ModelFacts,
    policies: dict[str, PolicyFacts],
    statistics: Statistics,
    damage: NDArray[np.floating] | None,
    budget: float | None = None,
    *,
    bytes: float | None = None,
    tokens: int,
    codec: str | None = None,
    **choices: Any,
) -> Plan:
    """Solve for a fraction of the slots, or of the bytes, from a profile's statistics; the model itself is not needed.

    The other arguments are those of `Solver`; raises as it and its `plan` do.
    """
    amount, in_bytes = asked_for(budget, bytes)
    codec = codec or (AUTO if in_bytes else NO_CODEC)
    solver = Solver(model, policies, statistics, damage, tokens, codec=codec, in_bytes=in_bytes, **choices)
    return solver.plan(amount)


class Settings(TypedDict, total=False):
    """How an amount is spent; what is not given, or None, is as in a profile's plan."""

    policy: str | None
    rule: str | None
    objective: str | None
    granularity: str | None
    mode: str | None
    codec: str | None


def solver_of(
    profile: Profile,
    damage: NDArray[np.floating] | None,
    *,
    measured: Mapping[str, NDArray[np.generic]] | None = None,
    in_bytes: bool | None = None,
    **settings: Unpack[Settings],
) -> Solver:
    """The solver for a profile. A `policy` may be one it does not hold yet.

    Where slots are counted now and bytes were before, or the other way round, the codec is chosen anew.
    """
    plan, policies = profile.plan, profile.policies
    before = plan.bytes is not None
    in_bytes = before if in_bytes is None else in_bytes
    changed = {} if in_bytes == before else {"codec": AUTO if in_bytes else NO_CODEC}
    given = {name: value for name, value in settings.items() if value is not None}
    spent: dict[str, Any] = {name: getattr(plan, name) for name in Settings.__annotations__} | changed | given
    if spent["policy"] not in (AUTO, *policies):
        policies = policies | _by_name(spent["policy"])
    return Solver(
        profile.model,
        policies,
        profile.statistics,
        damage,
        profile.calibration.measured.tokens,
        measured=measured,
        in_bytes=in_bytes,
        **spent,
    )


def replan(
    profile: Profile,
    damage: NDArray[np.floating] | None,
    budget: float | None = None,
    *,
    bytes: float | None = None,
    measured: Mapping[str, NDArray[np.generic]] | None = None,
    **settings: Unpack[Settings],
) -> Profile:
    """The same profile with a plan for another fraction of the slots, or of the bytes; what is not given stays as it was.

    `damage` and `measured` are as in `Solver`. A `policy` may also be one that the profile does not hold yet. The check is
    dropped: it was measured for the old plan.
    """
    if budget is None and bytes is None:
        budget, bytes = (profile.plan.budget, None) if profile.plan.bytes is None else (None, profile.plan.bytes)
    amount, in_bytes = asked_for(budget, bytes)
    solver = solver_of(profile, damage, measured=measured, in_bytes=in_bytes, **settings)
    return profile.model_copy(update={"policies": solver.policies, "plan": solver.plan(amount), "check": None})


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
