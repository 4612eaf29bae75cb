"""What the check measured, read off the profile."""

from kvprofile.planning.objectives import OBJECTIVES
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import Fidelity, ModeCheck


def own_check(profile: Profile) -> ModeCheck:
    """The check of the plan in its own mode. The profile must have a check."""
    assert profile.check is not None  # callers ask only then
    if profile.plan.mode == "threshold" and profile.check.threshold is not None:
        return profile.check.threshold
    return profile.check.exact


def kinds_of(fidelity: Fidelity) -> list[str]:
    """The kinds of text the check measured, in the schema's order."""
    return [name.removesuffix("_kl") for name in type(fidelity).model_fields if name.endswith("_kl")]


def measured_damage(fidelity: Fidelity, objective: str) -> float:
    """The measured KL that corresponds to predicted damage: the objective's sum over kinds, in nats per token."""
    weights = OBJECTIVES[objective]
    return sum(weights.get(kind, 0.0) * getattr(fidelity, f"{kind}_kl") for kind in kinds_of(fidelity))
