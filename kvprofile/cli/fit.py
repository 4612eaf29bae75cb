"""`kvprofile fit`: which budget fits a memory target."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import log_of
from kvprofile.cli.memory import gib, memory_options, too_large, wanted
from kvprofile.cli.options import complete_model, quiet_option
from kvprofile.profile.places import shipped

if TYPE_CHECKING:
    from kvprofile.cli.memory import Wanted
    from kvprofile.planning.fit import Fit, Found, Room
    from kvprofile.profile.profile import Profile

FLAGS = {"slots": "--budget", "bytes": "--bytes"}


@click.command(short_help="Tell which budget fits a memory target.")
@click.argument("model", shell_complete=complete_model)
@memory_options(required=True)
@click.option("--profile", type=click.Path(path_type=Path), help="Predict by this profile what the budget costs.")
@click.option("--json", "as_json", is_flag=True, help="Print bytes, amounts and rooms as JSON on stdout.")
@quiet_option
def fit(model: str, profile: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Tell which share of the slots fits into a device's memory, and with a profile which share of the bytes, and the cost.

    Works from MODEL's configuration: no weights are read, and the aliases (`kvprofile models`) need no network. Ends with
    exit code 3 where nothing fits.

    \b
    Examples:
      kvprofile fit llama3.1-8b --memory 24GB --context 32k --batch 4
      kvprofile fit smollm2-135m --memory 1GiB --context 8k --batch 8 --profile profile.json
    """
    from kvprofile.models.names import resolve
    from kvprofile.profile.storage import load_profile

    resolve(model, options["revision"])
    loaded = None if profile is None else load_profile(profile)
    asked = wanted(model, options, log_of(quiet))
    found = _found(asked, loaded)
    if as_json:
        values = {"model": model, "dtype": asked.dtype, **asdict(asked.target), **asdict(found)}
        click.echo(json.dumps(values, indent=1))
    else:
        _show(model, asked, found)
    fitting = [one for one in found.found if one.amount is not None]
    if not fitting:
        raise too_large(min(one.cache for one in found.found) - found.left)
    if not as_json:
        click.echo(_advice(model, profile, fitting))


def _found(asked: "Wanted", profile: "Profile | None") -> "Fit":
    """What fits; with a profile as it would spend it."""
    from kvprofile.planning.fit import even_spending
    from kvprofile.planning.fit import fit as solve

    if profile is None:
        return solve(asked.footprint, asked.target, [even_spending(asked.footprint, asked.target.context)])
    from kvprofile.planning.spendings import spendings_of
    from kvprofile.profile.fingerprint import model_facts

    profile.check_model(model_facts(asked.config))
    return solve(asked.footprint, asked.target, spendings_of(profile, profile.arrays(), asked.target.context))


def _show(model: str, asked: "Wanted", found: "Fit") -> None:
    target = asked.target
    texts = "one text" if target.batch == 1 else f"{target.batch} texts"
    lines = {
        "model": f"{model} in {asked.dtype}",
        "target": f"{texts} of {target.context:,} tokens in {gib(target.memory)}",
        "weights": gib(found.weights),
        "activations": f"{gib(found.activations)} (prompts read in pieces of {target.piece:,} tokens)",
        "reserve": gib(found.reserve),
        "left": f"{gib(found.left)} for the cache" if found.left > 0 else "nothing for the cache",
        "full cache": gib(found.full),
    }
    for name, text in lines.items():
        click.echo(f"{name:<12} {text}")
    for one in found.found:
        click.echo(f"{'fits' if one is found.found[0] else '':<12} {_fits(one)}")
    longest = f"longest context, batch {target.batch}"
    click.echo(f"{'keeps':<15} {longest:<30} {f'largest batch, {target.context:,} tokens':<30} predicted KL")
    for room in found.rooms:
        click.echo(_room(room, asked.footprint.longest))


def _fits(one: "Found") -> str:
    if one.amount is None:
        return f"no share of the {one.unit}: the smallest cache takes {gib(one.cache)}"
    told = (
        f"all {one.unit}"
        if one.amount == 1
        else f"{one.amount:.1%} of the {one.unit} ({FLAGS[one.unit]} {one.amount:.3f})"
    )
    cost = "" if one.predicted_kl is None else f", predicted KL {one.predicted_kl:.2g}"
    return f"{told}, a cache of {gib(one.cache)}{cost}"


def _room(room: "Room", longest: int | None) -> str:
    beyond = f" (made for {longest:,})" if longest is not None and room.context > longest else ""
    context = f"{room.context:,}{beyond}" if room.context else "none"
    cost = "unknown" if room.predicted_kl is None else f"{room.predicted_kl:.2g}"
    return f"{f'{room.amount:.0%} of {room.unit}':<15} {context:<30} {room.batch or 'none':<30} {cost}"


def _advice(model: str, profile: Path | None, fitting: "list[Found]") -> str:
    """What the best of what fits costs, and what to type next."""
    best = min(fitting, key=lambda one: one.predicted_kl or 0.0)
    if best.amount == 1:
        return "The full cache fits: nothing has to be merged."
    flag = f"{FLAGS[best.unit]} {best.amount:.3f}"
    if profile is None and model in shipped():
        return f"What it costs is known: a profile of it comes with kvprofile; give --profile {model}"
    if profile is None:
        return f"No profile yet, so nothing is known of its cost: kvprofile calibrate {model} {flag}"
    return (
        "KL is predicted by the profile's curves, in nats per token: on text like its calibration's, of that length.\n"
        f"Next: kvprofile plan {profile} {flag} -o planned.json"
    )
