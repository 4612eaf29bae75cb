"""From KVMerger as printed (arXiv 2407.08454) to our default, one change at a time, on the fidelity bench.

    python benchmarks/ablation.py profiles/smollm2-135m.json --documents 1 \\
        --text essay=essays/ --text book=books/ --text code=longbench:lcc:longbench --text encyclopedia=synthwiki:madlibs1.csv

Every step keeps the number of slots and changes one thing of the step before it. Every step is run with the same share of
slots in every head and with shares by its own measured damage, so that the worth of the budgets can be told from that of the
merging. Some changes are also made alone, to KVMerger or to our default, since their order could matter. The protection is
what was published for the budget: 17% newest and 12% heaviest tokens from 50% up, 8% and 2% below (published for 35%).

Damage of policies that the profile holds no curves for is measured on built-in text, once, and kept beside the output, as
finished rows are: an interrupted run goes on. Prints a table of steps, writes JSON, Markdown and a plot of all methods.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rivals import track_on_stderr
from safetensors.numpy import load_file, save

import kvprofile
from kvprofile.evaluate.bench import PARTS, run_fidelity
from kvprofile.evaluate.methods import ANCHOR_EPSILON, Method, profile_methods
from kvprofile.evaluate.results import results_of, write_results
from kvprofile.evaluate.rows import digest, identity, open_store
from kvprofile.evaluate.run import Choices, facts_of, make_documents
from kvprofile.evaluate.tables import OVER_MARK, table
from kvprofile.files import atomic_write
from kvprofile.measure import damage as damage_module
from kvprofile.measure.damage import BUDGETS, Reading, damage
from kvprofile.merging.affinity import AFFINITIES, Affinity, cosine
from kvprofile.merging.combine import Combination
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.protect import Protection, protected_tokens
from kvprofile.merging.sets import RULES, find_sets, mergeable_links
from kvprofile.merging.tokens import Tokens
from kvprofile.models import LoadedModel
from kvprofile.observe import observing
from kvprofile.plans import replan
from kvprofile.planting import plant
from kvprofile.probes import ProbeMix, make_probe
from kvprofile.profile import PolicyFacts, Profile
from kvprofile.samples import Sample
from kvprofile.sensitivity import read_probe

OWN = "the profile's plan"
UNIFORM, DAMAGE = "uniform", "by damage"
FINE = np.append(np.arange(6, 231) / 256, 0.9)  # the grid of shares on which heads differ in what they have to keep
OUT_OF_REACH = 1e6  # nats per token


@dataclass(frozen=True)
class Step:
    """A line of the table: what it is called, and its policy under the protection published for a budget."""

    name: str
    policy: Callable[[Protection], Policy]


def published(budget: float) -> Protection:
    """The protected shares published for a budget of 50%, and those for 35% below it."""
    recent, heavy = (0.17, 0.12) if budget >= 0.5 else (0.08, 0.02)
    return Protection(first=0, recent=0, recent_share=recent, heavy_share=heavy)


def kvmerger(**changed: Any) -> Callable[[Protection], Policy]:
    """KVMerger without value scaling, its combination changed."""
    base = POLICIES["kvmerger"]
    return lambda protection: replace(base, protection=protection, combination=replace(base.combination, **changed))


def fixed(policy: Policy) -> Callable[[Protection], Policy]:
    return lambda _protection: policy


def protected_as_published(policy: Policy) -> Callable[[Protection], Policy]:
    return lambda protection: replace(policy, protection=protection)


ATTENTION = Combination("attention", keep_pivot_key=True, bias="attention")
OURS = Protection()
MENDED = POLICIES["gather-mended"]
LADDER = (
    Step("1 KVMerger as printed", kvmerger(scale_values=True)),
    Step("2 values not scaled", kvmerger()),
    Step("3 count in the logits", kvmerger(bias="count")),
    Step("4 pivot's key kept", kvmerger(bias="count", keep_pivot_key=True)),
    Step("5 weights and bias by attention", protected_as_published(Policy("cosine", "anchor", combination=ATTENTION))),
    Step("6 first 4 and newest 32 protected", fixed(Policy("cosine", "anchor", OURS, ATTENTION))),
    Step("7 least value-attention joins nearest", fixed(Policy("value-attention", "nearest", OURS, ATTENTION))),
    Step("8 key averaged, count (gather)", fixed(POLICIES["gather"])),
    Step("9 values solved for (gather-mended)", fixed(MENDED)),
)
APART = (
    Step("2, merging off", lambda protection: replace(POLICIES["kvmerger-off"], protection=protection)),
    Step("2, pivot's key kept", kvmerger(keep_pivot_key=True)),
    Step("2, our protection", fixed(replace(POLICIES["kvmerger"], protection=OURS))),
    Step(
        "2, our selection",
        protected_as_published(replace(POLICIES["kvmerger"], affinity="value-attention", rule="nearest")),
    ),
    Step("9, merging off (value-attention)", fixed(POLICIES["value-attention"])),
    Step("9, no count", fixed(replace(MENDED, combination=replace(MENDED.combination, bias="none")))),
    Step("9, published protection", protected_as_published(MENDED)),
)
STEPS = (*LADDER, *APART)


def measurable(policy: Policy) -> Policy:
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


def calibrated(
    loaded: LoadedModel, profile: Profile, steps: dict[str, Policy], folder: Path, count: int
) -> tuple[Profile, NDArray[np.floating]]:
    """The profile with the steps for policies, and their damage `(layers, policies, kv_heads, budgets, kinds)`."""
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
            for name, policy in steps.items()
        }
        missing = {name: measurable(steps[name]) for name, path in paths.items() if not path.exists()}
        if missing:
            log(f"damage of {len(missing)} policies: sample {index + 1} of {len(samples)}")
            for name, curves in measured(loaded, sample, missing, layers=layers, mix=mix, seed=index).items():
                atomic_write(paths[name], save(curves))
        found.append([load_file(path) for path in paths.values()])
    mean = {name: np.array([[one[name] for one in own] for own in found]).mean(axis=0) for name in found[0][0]}
    curves = reachable(mean["damage"], mean["least"]).swapaxes(0, 1)
    policies = {name: PolicyFacts.model_validate(policy.to_dict()) for name, policy in steps.items()}
    statistics = profile.statistics.model_copy(
        update={"damage": facts.model_copy(update={"policies": [*steps], "budgets": FINE.tolist()})}
    )
    return profile.model_copy(update={"policies": policies, "statistics": statistics}), curves


def reachable(curves: NDArray[np.float64], least: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves `(..., heads, budgets, kinds)` on the grid `FINE`, out of reach below `least` `(..., heads)`."""
    logs = np.log(np.maximum(curves, 1e-12))
    place = np.clip(np.searchsorted(BUDGETS, FINE, side="right") - 1, 0, len(BUDGETS) - 2)
    low, high = np.array(BUDGETS)[place], np.array(BUDGETS)[place + 1]
    ahead = ((FINE - low) / (high - low))[:, None]
    fine = np.exp(logs[..., place, :] * (1 - ahead) + logs[..., place + 1, :] * ahead)
    return np.where(FINE[:, None] < least[..., None, None], OUT_OF_REACH, fine)


def measured(
    loaded: LoadedModel, sample: Sample, policies: dict[str, Policy], *, layers: list[int], mix: ProbeMix, seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Of every policy on one sample: `damage` `(layers, kv_heads, budgets, kinds)`, and `least` as in `least_share`."""
    found: list[NDArray[np.float64]] = []
    least: list[list[NDArray[np.float64]]] = []

    def on_reading(_layer: int, reading: Reading) -> None:
        found.append(damage(reading, list(policies.values()), mix.kinds))
        least.append([least_share(policy, reading.context) for policy in policies.values()])

    context, questions = plant(sample.context, loaded.tokenizer, facts=mix.facts, lookups=mix.lookups, seed=seed)
    probe = make_probe(context, sample.continuation, seed, mix=mix, questions=questions)
    with observing(loaded.model) as observer:
        read_probe(observer, probe, lambda *_call: None, on_reading, layers=layers, seed=seed)
    parts = zip(policies, np.stack(found, axis=1), np.stack(least, axis=1), strict=True)
    return {
        name: {"damage": np.ascontiguousarray(own), "least": np.ascontiguousarray(floor)} for name, own, floor in parts
    }


def least_share(policy: Policy, tokens: Tokens) -> NDArray[np.float64]:
    """The share `(kv_heads,)` of the tokens that cannot be merged: protected ones, and those without a free neighbour."""
    count = tokens.keys.shape[2]
    recent = policy.protection.recent_tokens(count)
    part = tokens.oldest(count - recent)
    protected = protected_tokens(policy.protection, part, policy.protection.heavy_tokens(count))[0]
    free = mergeable_links(protected) if policy.rule in RULES else ~protected
    return (1 - free.sum(-1) / count).double().numpy()


def name_of(profile: Profile, policy: Policy) -> str:
    """The name under which the profile holds the policy's damage, or one of our own."""
    for name in profile.statistics.damage.policies:
        if profile.policies[name].model_dump(mode="json") == policy.to_dict():
            return name
    return f"x-{digest(policy.to_dict())[:8]}"


def as_method(
    label: str, budget: float, planned: Profile, named: tuple[str, Policy], share: float | None = None
) -> Method:
    """One policy with the same share in every head, or with the plan's own; where it goes by a threshold, by KVMerger's."""
    name, policy = named
    values = planned.model_dump(mode="json")
    values["policies"] = {name: policy.to_dict()}
    values["plan"]["mode"] = "exact"
    for layer in values["plan"]["layers"]:
        layer["heads"] = [
            {"policy": name, "epsilon": ANCHOR_EPSILON, "share": head["share"] if share is None else share}
            for head in layer["heads"]
        ]
    return Method(label, budget, values)


def methods_of(loaded: LoadedModel, profile: Profile, arguments: argparse.Namespace) -> list[Method]:
    """Every step at every budget, evenly and by damage, and the profile's own plan."""
    arrays = kvprofile.load_arrays(profile, arguments.profile)
    steps = {budget: {step.name: step.policy(published(budget)) for step in STEPS} for budget in arguments.budgets}
    unknown = {
        name_of(profile, policy): policy
        for own in steps.values()
        for policy in own.values()
        if name_of(profile, policy) not in profile.statistics.damage.policies
    }
    found = calibrated(loaded, profile, unknown, arguments.output.with_suffix(".curves"), arguments.samples)
    methods = []
    for budget, own in steps.items():
        for label, policy in own.items():
            name = name_of(profile, policy)
            known, curves = found if name in unknown else (profile, arrays["damage_mean"])
            plan = replan(known, curves, budget, policy=name, rule="damage", granularity="head", mode="exact")
            methods += [
                as_method(f"{label}, {UNIFORM}", budget, profile, (name, policy), budget),
                as_method(f"{label}, {DAMAGE}", budget, plan, (name, policy)),
            ]
        methods += profile_methods(OWN, profile, arrays, [budget])
    return methods


def ablation_table(summary: Sequence[dict[str, Any]], budgets: Sequence[float]) -> str:
    """A line for every step and budget: KL of recall, look-up and continuation, evenly and by damage."""
    found = {(entry["method"], entry["slots_asked"]): entry for entry in summary}
    lines = []
    for budget in budgets:
        for label in [step.name for step in STEPS]:
            entries = [found[f"{label}, {how}", budget] for how in (UNIFORM, DAMAGE)]
            lines.append([f"{budget:g}", label, *(cell for entry in entries for cell in cells(entry))])
        lines.append([f"{budget:g}", OWN, *[""] * (1 + len(PARTS)), *cells(found[OWN, budget])])
    heads = [f"{how}: {column}" for how in (UNIFORM, DAMAGE) for column in ("slots", *PARTS)]
    return table(["budget", "step", *heads], lines)


def cells(entry: dict[str, Any]) -> list[str]:
    """Slots, marked where there are more than asked for, and the mean KL of every part."""
    return [
        f"{entry['slots']:.3f}" + OVER_MARK * entry["over_budget"],
        *(f"{entry['measures'][f'{part} KL']['mean']:.4f}" for part in PARTS),
    ]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="for its statistics, and its plan as the last line")
    parser.add_argument("--model", help="default: the profile's")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--samples", type=int, default=4, help="of built-in text, to measure damage on")
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--documents", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("ablation.json"))
    arguments = parser.parse_args()
    profile = kvprofile.load_profile(arguments.profile)
    if profile.statistics.damage is None:
        parser.error(f"{arguments.profile} holds no damage curves; calibrate with the rule damage")
    choices = Choices(
        profiles=(arguments.profile,),
        texts=tuple(arguments.text) or ("builtin",),
        documents=arguments.documents,
        tokens=arguments.tokens,
        seed=arguments.seed,
    )
    loaded = kvprofile.load_model(arguments.model or profile.model.name)
    methods = methods_of(loaded, profile, arguments)
    store = open_store(arguments.output.with_suffix(".rows.jsonl"))
    rows = run_fidelity(
        loaded, make_documents(loaded, choices), methods, store, seed=choices.seed, track=track_on_stderr()
    )
    results = results_of(rows, facts_of(loaded, choices, {arguments.profile.stem: profile}, {}))
    write_results(results, rows, arguments.output, judged=[OWN])
    text = ablation_table(results["methods"], arguments.budgets)
    atomic_write(arguments.output.with_suffix(".steps.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
