"""What is compared: the full cache, a profile's plan, and plans of other policies with the same number of slots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from numpy.typing import NDArray

from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.planning.plans import replan
from kvprofile.profile.measured_arrays import centring
from kvprofile.profile.profile import Profile
from kvprofile.profile.unmeasured import UNSAID

FULL = "full cache"
# What a head's part of a plan does to numbers.
_DECIDING = ("policy", "epsilon", "share", "key_codec", "value_codec")
ANCHOR_EPSILON = 0.75
"""Where a policy's sets need a threshold: KVMerger's own, arXiv 2407.08454, then corrected to the asked number of slots."""


@dataclass(frozen=True)
class Method:
    """One way to keep the context.

    Attributes:
        name: what tables call it.
        budget: the fraction of slots asked for.
        plan: a profile's JSON values for the runtime; None is the full cache.
        key_mean: the means `(layers, kv_heads, head_dim)` by which its codecs centre keys, where they do.
    """

    name: str
    budget: float
    plan: dict[str, Any] | None
    key_mean: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    def what_runs(self) -> Any:
        """What decides the numbers, as JSON values: the plan's heads and their policies, without any names of files."""
        if self.plan is None:
            return None
        layers = [
            [{key: head[key] for key in _DECIDING} for head in layer["heads"]] for layer in self.plan["plan"]["layers"]
        ]
        used = {head["policy"] for layer in layers for head in layer}
        policies = {name: values for name, values in self.plan["policies"].items() if name in used}
        runs = {"mode": self.plan["plan"]["mode"], "layers": layers, "policies": policies}
        return runs if self.key_mean is None else runs | {"key_mean": sha256(self.key_mean.tobytes()).hexdigest()}


def profile_methods(
    name: str, profile: Profile, arrays: Mapping[str, NDArray[Any]], budgets: Sequence[float]
) -> list[Method]:
    """A profile's plan at every budget: as it is at its own, solved again from its statistics at the others.

    `arrays` are the profile's: needed for other budgets, and where a plan's codecs centre keys. Raises MismatchError where a
    budget is out of reach.
    """
    plans = {
        budget: profile
        if budget == profile.plan.budget
        else replan(profile, arrays.get("damage_mean"), budget, measured=arrays)
        for budget in budgets
    }
    return [
        Method(name, budget, plan.model_dump(mode="json"), arrays["key_mean"] if centring(plan) else None)
        for budget, plan in plans.items()
    ]


def uniform_methods(profile: Profile, names: Sequence[str], budgets: Sequence[float]) -> list[Method]:
    """Policies of `POLICIES` with the same share of slots in every head, met exactly, for the profile's model."""
    return [
        Method(f"{name}, uniform", budget, uniform_plan(profile, name, POLICIES[name], budget))
        for budget in budgets
        for name in names
    ]


def uniform_plan(profile: Profile, name: str, policy: Policy, budget: float) -> dict[str, Any]:
    """A profile's JSON values with one policy, called `name`, and one share for every head."""
    values = profile.model_dump(mode="json")
    values["policies"][name] = policy.to_dict()
    head = {**UNSAID, "policy": name, "epsilon": ANCHOR_EPSILON, "share": budget}
    for layer in values["plan"]["layers"]:
        layer["heads"] = [head for _ in layer["heads"]]
    values["plan"]["mode"] = "exact"
    return values
