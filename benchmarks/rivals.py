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

from shared.every_method import OWN, add_arguments, compare
from shared.single_policies import Source, by_damage, evenly, held, measured_source

import kvprofile
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.methods import Method, profile_methods
from kvprofile.evaluate.tables import main_table
from kvprofile.merging.policies import POLICIES
from kvprofile.models.load import LoadedModel
from kvprofile.profile.profile import Profile


def methods_of(loaded: LoadedModel, profile: Profile, arguments: argparse.Namespace) -> list[Method]:
    """All methods; what cannot be had at a budget is told on stderr and left out."""
    arrays = kvprofile.load_arrays(profile, arguments.profile)
    policies = {name: POLICIES[name] for name in arguments.policies}
    unknown = {name: policy for name, policy in policies.items() if held(profile, policy) is None}
    source_of = dict.fromkeys(policies, Source(profile, arrays["damage_mean"]))
    if unknown:
        found = measured_source(loaded, profile, unknown, arguments.curves, arguments.samples)
        source_of |= dict.fromkeys(unknown, found)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "rivals.json")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    print(main_table(compare(parser, methods_of)[1]))


if __name__ == "__main__":
    main()
