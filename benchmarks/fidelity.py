"""What a plan does to the model's answers, beside other plans of the same number of slots.

    python benchmarks/fidelity.py profiles/smollm2-135m.json --budgets 0.5 0.25 \\
        --text essay=essays/ --text book=books/ --text code=longbench:lcc:longbench --text encyclopedia=synthwiki:madlibs1.csv

A context is read, compressed by the real runtime cache, and only then do four 48-token passages of it (recall, at places
drawn afresh) and the next 256 tokens (continuation) follow: KL(full || compressed) of the next-token distribution, in nats
per token, with 95% bootstrap intervals over documents. Slots are counted in the cache, every stored slot of every head;
bytes are those allocated, over the full cache's. Without --text, held-out built-in text is used. Prints tables, writes JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from shared.trials import make_trials
from transformers import DynamicCache

import kvprofile
from kvprofile.evaluate.check import run_merged
from kvprofile.evaluate.fidelity import distance, read_through
from kvprofile.evaluate.intervals import bootstrap
from kvprofile.evaluate.methods import uniform_plan
from kvprofile.merging.policies import POLICIES
from kvprofile.names import MODES
from kvprofile.planning.plans import replan
from kvprofile.runtime.cache import allocated_bytes
from kvprofile.runtime.merger import KVMerger

UNIFORM = ("h2o", "snapkv", "streaming", "kvmerger")


def plans(profile: Any, damage: Any, budget: float, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Every plan of one budget as profile values for the runtime."""
    made: dict[str, dict[str, Any]] = {}
    singles = profile.statistics.damage.policies if profile.statistics.damage else []
    for name in UNIFORM:
        made[f"{name}, uniform"] = uniform_plan(profile, name, POLICIES[name], budget)
    for name in singles:
        # The same shares, met to the slot or by the thresholds that keep them on average.
        for mode in MODES if POLICIES[name].affinity == "cosine" else ("exact",):
            plan = replan(profile, damage, budget, policy=name, rule="damage", mode=mode)
            made[f"{name}, by damage, {mode}"] = plan.model_dump(mode="json")
    made["auto, by damage and layer"] = replan(
        profile, damage, budget, policy="auto", rule="damage", granularity="layer"
    ).model_dump(mode="json")
    made["auto, by damage"] = replan(profile, damage, budget, policy="auto", rule="damage").model_dump(mode="json")
    return {name: values for name, values in made.items() if not wanted or any(part in name for part in wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--model", help="default: the profile's")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25, 0.15])
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--column")
    parser.add_argument("--documents", type=int, default=2, help="of each kind")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plans", nargs="*", default=[], help="only plans whose name contains one of these")
    parser.add_argument("-o", "--output", type=Path, default=Path("fidelity.json"))
    arguments = parser.parse_args()
    profile = kvprofile.load_profile(arguments.profile)
    damage = kvprofile.load_arrays(profile, arguments.profile).get("damage_mean")
    loaded = kvprofile.load_model(arguments.model or profile.model.name)
    trials = make_trials(
        loaded,
        arguments.text,
        documents=arguments.documents,
        tokens=arguments.tokens,
        seed=arguments.seed,
        column=arguments.column,
    )
    rows: list[dict[str, Any]] = []
    for index, (kind, trial) in enumerate(trials):
        sizes: list[int] = []
        reference = read_through(
            loaded.model,
            DynamicCache(config=loaded.model.config),
            trial,
            lambda cache: sizes.append(allocated_bytes(cache)),  # noqa: B023
        )
        for budget in arguments.budgets:
            for name, values in plans(profile, damage, budget, arguments.plans).items():
                merged, slots, size = run_merged(
                    loaded.model, KVMerger.from_profile(values), trial, profile.attention_layers()
                )
                recall, continuation = (distance(*pair) for pair in zip(reference, merged, strict=True))
                row = {"document": index, "kind": kind, "budget": budget, "plan": name, "slots": slots}
                row |= {"bytes": size / sizes[0], "recall": recall.kl, "continuation": continuation.kl}
                row |= {"recall_top1": recall.top1, "continuation_top1": continuation.top1}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1))
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Recall / continuation KL by plan: the mean of the kinds with its interval over documents, and each kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    print("| budget | plan | slots | bytes | recall KL | continuation KL | top-1 | " + " | ".join(kinds) + " |")
    print("|" + "---|" * (7 + len(kinds)))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for plan in dict.fromkeys(row["plan"] for row in rows):
            chosen = [row for row in rows if row["budget"] == budget and row["plan"] == plan]
            if not chosen:
                continue
            cells = []
            for measure in ("recall", "continuation"):
                values = [row[measure] for row in chosen]
                low, high = bootstrap(values)
                cells.append(f"{np.mean(values):.4f} ({low:.4f}-{high:.4f})")
            by_kind = [
                " / ".join(
                    f"{np.mean([row[measure] for row in chosen if row['kind'] == kind]):.4f}"
                    for measure in ("recall", "continuation")
                )
                for kind in kinds
            ]
            means = [np.mean([row[name] for row in chosen]) for name in ("slots", "bytes")]
            top1 = " / ".join(
                f"{np.mean([row[f'{name}_top1'] for row in chosen]):.3f}" for name in ("recall", "continuation")
            )
            print(
                f"| {budget:g} | {plan} | {means[0]:.3f} | {means[1]:.3f} | "
                + " | ".join([*cells, top1, *by_kind])
                + " |"
            )


if __name__ == "__main__":
    main()
