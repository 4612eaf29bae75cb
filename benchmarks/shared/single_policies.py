"""Plans of one policy for all heads, evenly or by the policy's own damage, also of policies that a profile has no curves for.

Their damage is measured on built-in text, once for each sample, and kept in a folder: an interrupted run goes on.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

import kvprofile
from kvprofile.calibration.measure import damage as damage_module
from kvprofile.calibration.measure.damage import BUDGETS, damage
from kvprofile.calibration.measure.probed import Reading
from kvprofile.calibration.observe import observing
from kvprofile.calibration.planting import plant
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.probes import make_probe
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.evaluate.methods import ANCHOR_EPSILON, Method, uniform_plan
from kvprofile.evaluate.rows import digest, identity
from kvprofile.files import atomic_write
from kvprofile.merging.affinity import AFFINITIES, Affinity, cosine
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.sets import SET_RULES, find_sets, mergeable_links
from kvprofile.merging.tokens import Tokens
from kvprofile.models.load import LoadedModel
from kvprofile.planning.plans import replan
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import PolicyFacts
from kvprofile.samples import Sample

FINE = np.append(np.arange(6, 231) / 256, 0.9)  # the grid of shares on which heads differ in what they have to keep
OUT_OF_REACH = 1e6  # nats per token


@dataclass(frozen=True)
class Source:
    """A profile that knows the damage of some policies, and their curves `(layers, policies, kv_heads, budgets, kinds)`."""

    profile: Profile
    curves: NDArray[np.floating]


def evenly(label: str, budget: float, profile: Profile, name: str, policy: Policy) -> Method:
    """The policy with the same share in every head."""
    return Method(label, budget, uniform_plan(profile, name, policy, budget))


def by_damage(label: str, budget: float, source: Source, name: str, policy: Policy) -> Method:
    """The policy with shares by its damage. Raises MismatchError where the budget is out of its reach."""
    planned = replan(
        source.profile, source.curves, budget, policy=name, rule="damage", granularity="head", mode="exact"
    )
    values = uniform_plan(planned, name, policy, budget)
    for layer, own in zip(values["plan"]["layers"], planned.plan.layers, strict=True):
        for head, planned_head in zip(layer["heads"], own.heads, strict=True):
            head["share"] = planned_head.share
    return Method(label, budget, values)


def held(profile: Profile, policy: Policy) -> str | None:
    """The name under which the profile holds the policy's damage, if it does."""
    for name in profile.statistics.damage.policies:
        if profile.policies[name].model_dump(mode="json") == policy.to_dict():
            return name
    return None


def measured_source(
    loaded: LoadedModel, profile: Profile, policies: Mapping[str, Policy], folder: Path, count: int
) -> Source:
    """The profile with these policies alone and their damage, mean of `count` samples, measured where `folder` lacks it."""
    facts = profile.statistics.damage
    mix = ProbeMix(**{field.name: getattr(facts, field.name) for field in fields(ProbeMix)})
    samples = kvprofile.make_samples(
        kvprofile.load_documents("builtin"),
        loaded.tokenizer,
        samples=count,
        tokens=profile.calibration.measured.tokens,
        held_out=0,
        continuation=256,
    ).calibration
    layers = profile.model.full_attention_layers()
    folder.mkdir(parents=True, exist_ok=True)
    known = digest(identity(loaded), inspect.getsource(damage_module), str(mix))
    found: list[list[dict[str, NDArray[np.float64]]]] = []
    for index, sample in enumerate(samples):
        paths = {
            name: folder
            / f"{digest(known, index, sample.context, sample.continuation, policy.to_dict())[:16]}.safetensors"
            for name, policy in policies.items()
        }
        missing = {name: _measurable(policies[name]) for name, path in paths.items() if not path.exists()}
        if missing:
            print(f"damage of {len(missing)} policies: sample {index + 1} of {count}", file=sys.stderr, flush=True)
            for name, curves in _measured(loaded, sample, missing, layers=layers, mix=mix, seed=index).items():
                atomic_write(paths[name], save(curves))
        found.append([load_file(path) for path in paths.values()])
    mean = {name: np.array([[one[name] for one in own] for own in found]).mean(axis=0) for name in found[0][0]}
    curves = _reachable(mean["damage"], mean["least"]).swapaxes(0, 1)
    statistics = profile.statistics.model_copy(
        update={"damage": facts.model_copy(update={"policies": [*policies], "budgets": FINE.tolist()})}
    )
    values = {name: PolicyFacts.model_validate(policy.to_dict()) for name, policy in policies.items()}
    return Source(profile.model_copy(update={"policies": values, "statistics": statistics}), curves)


def _measurable(policy: Policy) -> Policy:
    """The same policy in a form whose damage can be measured at any number of slots.

    Anchor sets go by a threshold, which damage curves do not know. With the threshold fixed, a slot count decides: the links
    inside the sets go first, then the most similar ones between them. That is an order of the tokens, so it is an affinity.
    """
    if policy.rule != "anchor":
        return policy
    protection = policy.protection

    def within_sets_first(tokens: Tokens) -> torch.Tensor:
        protected = protected_tokens(protection, tokens, protection.heavy_tokens(tokens.seen))
        epsilon = torch.full((tokens.keys.shape[1],), ANCHOR_EPSILON)
        return cosine(tokens) + 4.0 * ~find_sets(tokens.keys, epsilon, "anchor", protected)

    name = f"x-anchor-{digest(vars(protection))[:8]}"
    AFFINITIES[name] = Affinity(within_sets_first, mass=True)
    return replace(policy, affinity=name, rule="chain")


def _measured(
    loaded: LoadedModel, sample: Sample, policies: dict[str, Policy], *, layers: list[int], mix: ProbeMix, seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Of every policy on one sample: `damage` `(layers, kv_heads, budgets, kinds)`, and `least` as in `_least_share`."""
    found: list[NDArray[np.float64]] = []
    least: list[list[NDArray[np.float64]]] = []

    def on_reading(_layer: int, reading: Reading) -> None:
        found.append(damage(reading, list(policies.values()), mix.kinds))
        least.append([_least_share(policy, reading.context) for policy in policies.values()])

    context, questions = plant(sample.context, loaded.tokenizer, facts=mix.facts, lookups=mix.lookups, seed=seed)
    probe = make_probe(context, sample.continuation, seed, mix=mix, questions=questions)
    with observing(loaded.model) as observer:
        read_probe(observer, probe, lambda *_call: None, on_reading, layers=layers, seed=seed)
    parts = zip(policies, np.stack(found, axis=1), np.stack(least, axis=1), strict=True)
    return {
        name: {"damage": np.ascontiguousarray(own), "least": np.ascontiguousarray(floor)} for name, own, floor in parts
    }


def _least_share(policy: Policy, tokens: Tokens) -> NDArray[np.float64]:
    """The share `(kv_heads,)` of the tokens that cannot be merged: protected ones, and those without a free neighbour."""
    count = tokens.keys.shape[2]
    recent = policy.protection.recent_tokens(count)
    part = tokens.oldest(count - recent)
    protected = protected_tokens(policy.protection, part, policy.protection.heavy_tokens(count))[0]
    free = mergeable_links(protected) if policy.rule in SET_RULES else ~protected
    return (1 - free.sum(-1) / count).double().numpy()


def _reachable(curves: NDArray[np.float64], least: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves `(..., heads, budgets, kinds)` on the grid `FINE`, out of reach below `least` `(..., heads)`."""
    logs = np.log(np.maximum(curves, 1e-12))
    place = np.clip(np.searchsorted(BUDGETS, FINE, side="right") - 1, 0, len(BUDGETS) - 2)
    low, high = np.array(BUDGETS)[place], np.array(BUDGETS)[place + 1]
    ahead = ((FINE - low) / (high - low))[:, None]
    fine = np.exp(logs[..., place, :] * (1 - ahead) + logs[..., place + 1, :] * ahead)
    return np.where(FINE[:, None] < least[..., None, None], OUT_OF_REACH, fine)
