"""Every policy there is, spread evenly and by measured damage, beside a profile's own plan, on the fidelity bench.

    python benchmarks/rivals.py profiles/smollm2-135m.json --documents 2 \\
        --text essay=essays/ --text book=books/ --text code=longbench:lcc:longbench --text encyclopedia=synthwiki:madlibs1.csv

Contexts are read, compressed by the real runtime cache, and only then read from: passages of them again (recall), key-value
lines planted in them (look-up) and the text that follows (continuation). KL(full || compressed) in nats per token with 95%
bootstrap intervals over documents, paired differences from the full cache's likelihoods and from the best rival, slots and
bytes as stored. The damage of policies that the profile holds no curves for is measured first, on built-in text. Curves and
finished rows are kept beside the output and used again where nothing that decides them has changed: an interrupted run goes
on. Prints the table, writes JSON, Markdown, PNG.
"""

import argparse
import sys
from pathlib import Path

from single_policies import Source, by_damage, evenly, held, measured_source

import kvprofile
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.bench import run_fidelity
from kvprofile.evaluate.methods import Method, profile_methods
from kvprofile.evaluate.results import results_of, write_results
from kvprofile.evaluate.rows import open_store
from kvprofile.evaluate.run import Choices, facts_of, make_documents
from kvprofile.evaluate.tables import main_table
from kvprofile.merging.policies import POLICIES
from kvprofile.models import LoadedModel
from kvprofile.profile import Profile
from kvprofile.tracking import Track

OWN = "the profile's plan"


def methods_of(loaded: LoadedModel, profile: Profile, arguments: argparse.Namespace) -> list[Method]:
    """All methods; what cannot be had at a budget is told on stderr and left out."""
    arrays = kvprofile.load_arrays(profile, arguments.profile)
    policies = {name: POLICIES[name] for name in arguments.policies}
    unknown = {name: policy for name, policy in policies.items() if held(profile, policy) is None}
    source_of = dict.fromkeys(policies, Source(profile, arrays["damage_mean"]))
    if unknown:
        folder = arguments.curves or arguments.output.with_suffix(".curves")
        source_of |= dict.fromkeys(unknown, measured_source(loaded, profile, unknown, folder, arguments.samples))
    methods = []
    for budget in arguments.budgets:
        methods += profile_methods(OWN, profile, arrays, [budget])
        for name, policy in policies.items():
            methods.append(evenly(f"{name}, uniform", budget, profile, name, policy))
            try:
                methods.append(by_damage(f"{name}, by damage", budget, source_of[name], name, policy))
            except KVProfileError as error:
                print(f"left out: {name} by damage: {error}", file=sys.stderr)
    return methods


def track_on_stderr() -> Track:
    def track(items, label):
        for number, item in enumerate(items, start=1):
            print(f"{label}: document {number} of {len(items)}", file=sys.stderr, flush=True)
            yield item

    return track


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--model", help="default: the profile's")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--samples", type=int, default=2, help="of built-in text, to measure damage on")
    parser.add_argument("--curves", type=Path, help="folder of measured damage; default: beside the output")
    parser.add_argument("--documents", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("rivals.json"))
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
    print(main_table(results["methods"]))


if __name__ == "__main__":
    main()
