"""What the benches over many methods share: their arguments, the run over held-out documents, and its files."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvprofile
from kvprofile.calibration.tracking import Track
from kvprofile.evaluate.bench import run_fidelity
from kvprofile.evaluate.methods import Method
from kvprofile.evaluate.results import results_of, write_results
from kvprofile.evaluate.rows import open_store
from kvprofile.evaluate.run import Choices, facts_of, make_documents
from kvprofile.models.load import LoadedModel
from kvprofile.profile.profile import Profile

OWN = "the profile's plan"


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The profile, the texts, and where damage is measured and kept; `output` is the default file of results."""
    parser.add_argument("profile", type=Path, help="for its statistics, and its own plan beside the others")
    parser.add_argument("--model", help="default: the profile's")
    parser.add_argument("--samples", type=int, default=2, help="of built-in text, to measure damage on")
    parser.add_argument("--curves", type=Path, help="folder of measured damage; default: beside the output")
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=SPEC", help="as kvprofile calibrate --data"
    )
    parser.add_argument("--documents", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path(output))


def compare(
    parser: argparse.ArgumentParser, methods_of: Callable[[LoadedModel, Profile, argparse.Namespace], list[Method]]
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """Run what the command line asks for and write its files; returns the arguments and the summary by method."""
    arguments = parser.parse_args()
    profile = kvprofile.load_profile(arguments.profile)
    if profile.statistics.damage is None:
        parser.error(f"{arguments.profile} holds no damage curves; calibrate with the rule damage")
    arguments.curves = arguments.curves or arguments.output.with_suffix(".curves")
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
        loaded, make_documents(loaded, choices), methods, store, seed=choices.seed, track=TrackOnStderr()
    )
    results = results_of(rows, facts_of(loaded, choices, {arguments.profile.stem: profile}, {}))
    write_results(results, rows, arguments.output, judged=[OWN])
    return arguments, results["methods"]


class TrackOnStderr(Track):
    def __call__(self, items, label):
        for number, item in enumerate(items, start=1):
            print(f"{label}: document {number} of {len(items)}", file=sys.stderr, flush=True)
            yield item
