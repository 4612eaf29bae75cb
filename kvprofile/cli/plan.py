"""`kvprofile plan`: solve a profile for another budget."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import check_writable, log_of
from kvprofile.cli.memory import memory_options
from kvprofile.cli.options import (
    BUDGET,
    BYTES,
    BYTES_HELP,
    CALIBRATED_WITH,
    check_one_of,
    plan_choices,
    plan_options,
    quiet_option,
)
from kvprofile.errors import UsageError
from kvprofile.names import AUTO, NO_CODEC, POLICY_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from kvprofile.profile.profile import Profile


@click.command(short_help="Solve a PROFILE for another budget.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--budget", type=BUDGET, metavar="SHARE", help="Share of KV slots to keep.  [default: the profile's own]")
@click.option("--bytes", "size", type=BYTES, metavar="SHARE", help=BYTES_HELP)
@click.option("--codec", metavar="NAME", help="How slots are stored: none, auto (with --bytes), NAME or KEYS/VALUES.")
@memory_options(required=False)
@click.option("--model", metavar="MODEL", help="With --memory: whose configuration counts.  [default: the profile's]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The profile to write.")
@click.option("--policy", metavar="NAME", help="auto, or the name of a policy; see docs/policies.md.")
@plan_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
@quiet_option
def plan(
    profile: Path,
    budget: float | None,
    size: float | None,
    codec: str | None,
    output: Path,
    policy: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Solve a PROFILE for another share of the slots, or of the bytes. Needs neither the model nor a GPU.

    With --memory and --context the share is the largest that fits: of the bytes where codecs were measured, otherwise (and
    with --codec none) of the slots. That needs the model's configuration, which the aliases bring along.

    What is not given stays as it was. The check is left out of the new profile: it was measured for the old plan.

    \b
    Examples:
      kvprofile plan profile.json --budget 0.25 -o quarter.json
      kvprofile plan profile.json --bytes 0.15 -o small.json
      kvprofile plan profile.json --memory 24GB --context 32k --batch 4 -o fits.json
      kvprofile plan profile.json --budget 0.25 --rule pyramidkv --policy snapkv -o pyramid.json
    """
    from kvprofile.planning.plans import replan
    from kvprofile.planning.rules import PUBLISHED
    from kvprofile.profile.storage import load_arrays, load_profile, save_planned
    from kvprofile.report import terminal
    from kvprofile.report.plan_words import kept

    check_writable(output, force)
    loaded = load_profile(profile)
    _check_policy(policy, loaded)
    check_one_of(budget, size)
    asked = _memory_options(options, given=budget is not None or size is not None)
    choices = plan_choices(options)
    published = choices.get("rule", loaded.plan.rule) in PUBLISHED
    arrays = load_arrays(loaded, profile) if loaded.statistics.damage or published else {}
    if asked is not None:
        budget, size = _fitting(loaded, arrays, asked, codec=codec, policy=policy, choices=choices, log=log_of(quiet))
    planned = replan(
        loaded, arrays.get("damage_mean"), budget, bytes=size, codec=codec, policy=policy, measured=arrays, **choices
    )
    # Time, seconds and versions stay those of the measuring, and so does its command: the plan's follows it.
    command = " && ".join(filter(None, (loaded.created.command, shlex.join(["kvprofile", *sys.argv[1:]]))))
    planned = planned.model_copy(update={"created": planned.created.model_copy(update={"command": command})})
    _, written = save_planned(planned, profile, output, force=force)
    if as_json:
        click.echo(terminal.as_json(planned))
    log_of(quiet)(f"The plan {kept(planned.plan)}.")
    for path in written:
        log_of(quiet)(f"Wrote {path}")


def _memory_options(options: dict[str, Any], *, given: bool) -> dict[str, Any] | None:
    """Take the flags of a memory target out of `options`; None where there is no target."""
    taken = {
        name: options.pop(name)
        for name in ("memory", "context", "batch", "dtype", "weights", "reserve", "piece", "revision", "model")
    }
    if taken["memory"] is None and taken["context"] is None:
        return None
    if taken["memory"] is None or taken["context"] is None:
        raise UsageError("a memory target is --memory and --context together, for example --memory 24GB --context 32k")
    if given:
        raise UsageError("--memory solves for the share that fits; leave --budget and --bytes out")
    return taken


def _fitting(
    profile: "Profile",
    arrays: "Mapping[str, np.ndarray]",
    asked: dict[str, Any],
    *,
    codec: str | None,
    policy: str | None,
    choices: dict[str, Any],
    log: "Callable[[str], None]",
) -> tuple[float | None, float | None]:
    """The largest budget, or the most bytes, that fits: one of the two, the other is None."""
    from kvprofile.cli.memory import gib, too_large, wanted
    from kvprofile.planning.fit import largest_amount
    from kvprofile.planning.spendings import spending_of
    from kvprofile.profile.fingerprint import model_facts

    target = wanted(asked["model"] or profile.model.name, asked, log)
    profile.check_model(model_facts(target.config))
    measured = profile.statistics.damage
    in_bytes = codec != NO_CODEC and measured is not None and bool(measured.codecs)
    codec = codec or (AUTO if in_bytes else NO_CODEC)
    context = target.target.context
    spending = spending_of(profile, arrays, context, in_bytes=in_bytes, codec=codec, policy=policy, **choices)
    found = largest_amount(target.footprint, target.target, spending)
    left = target.target.left(target.footprint)
    if found.amount is None:
        raise too_large(found.cache - left)
    log(f"{found.amount:.1%} of the {found.unit} fit: a cache of {gib(found.cache)} where {gib(left)} are left.")
    return (None, found.amount) if in_bytes else (found.amount, None)


def _check_policy(policy: str | None, profile: "Profile") -> None:
    """Refuse a name that neither the profile nor kvprofile knows, and list those that work for this profile."""
    if policy is None or policy in (*POLICY_NAMES, *profile.policies):
        return
    known = [name for name in POLICY_NAMES if name in profile.policies or name not in CALIBRATED_WITH]
    known += [name for name in profile.policies if name not in known]
    raise UsageError(f"unknown policy {policy!r}; expected one of {', '.join(known)}")
