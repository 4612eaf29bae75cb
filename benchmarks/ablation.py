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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.every_method import OWN, add_arguments, compare
from shared.single_policies import Source, by_damage, evenly, held, measured_source

import kvprofile
from kvprofile.evaluate.bench import PARTS
from kvprofile.evaluate.methods import Method, profile_methods
from kvprofile.evaluate.rows import digest
from kvprofile.evaluate.tables import OVER_MARK, table
from kvprofile.files import atomic_write
from kvprofile.merging.combine import Combination
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.protect import Protection
from kvprofile.models.load import LoadedModel
from kvprofile.profile.profile import Profile

UNIFORM, DAMAGE = "uniform", "by damage"


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


def methods_of(loaded: LoadedModel, profile: Profile, arguments: argparse.Namespace) -> list[Method]:
    """Every step at every budget, evenly and by damage, and the profile's own plan."""
    arrays = kvprofile.load_arrays(profile, arguments.profile)
    steps = {budget: {step.name: step.policy(published(budget)) for step in STEPS} for budget in arguments.budgets}
    every = [policy for own in steps.values() for policy in own.values()]
    unknown = {own_name(policy): policy for policy in every if held(profile, policy) is None}
    found = measured_source(loaded, profile, unknown, arguments.curves, arguments.samples)
    known = Source(profile, arrays["damage_mean"])
    methods = []
    for budget, own in steps.items():
        for label, policy in own.items():
            name = held(profile, policy)
            source, name = (found, own_name(policy)) if name is None else (known, name)
            methods += [
                evenly(f"{label}, {UNIFORM}", budget, profile, name, policy),
                by_damage(f"{label}, {DAMAGE}", budget, source, name, policy),
            ]
        methods += profile_methods(OWN, profile, arrays, [budget])
    return methods


def own_name(policy: Policy) -> str:
    """A name for a policy that has none."""
    return f"x-{digest(policy.to_dict())[:8]}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "ablation.json")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    arguments, summary = compare(parser, methods_of)
    text = ablation_table(summary, arguments.budgets)
    atomic_write(arguments.output.with_suffix(".steps.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
