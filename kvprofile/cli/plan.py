"""`kvprofile plan`: solve a profile for another budget."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import check_writable, log_of
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
from kvprofile.names import POLICY_NAMES

if TYPE_CHECKING:
    from kvprofile.profile.profile import Profile


@click.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--budget", type=BUDGET, metavar="SHARE", help="Share of KV slots to keep.  [default: the profile's own]")
@click.option("--bytes", "size", type=BYTES, metavar="SHARE", help=BYTES_HELP)
@click.option("--codec", metavar="NAME", help="How slots are stored: none, auto (with --bytes), NAME or KEYS/VALUES.")
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

    What is not given stays as it was. The check is left out of the new profile: it was measured for the old plan.

    \b
    Examples:
      kvprofile plan profile.json --budget 0.25 -o quarter.json
      kvprofile plan profile.json --bytes 0.15 -o small.json
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
    choices = plan_choices(options)
    published = choices.get("rule", loaded.plan.rule) in PUBLISHED
    arrays = load_arrays(loaded, profile) if loaded.statistics.damage or published else {}
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


def _check_policy(policy: str | None, profile: "Profile") -> None:
    """Refuse a name that neither the profile nor kvprofile knows, and list those that work for this profile."""
    if policy is None or policy in (*POLICY_NAMES, *profile.policies):
        return
    known = [name for name in POLICY_NAMES if name in profile.policies or name not in CALIBRATED_WITH]
    known += [name for name in profile.policies if name not in known]
    raise UsageError(f"unknown policy {policy!r}; expected one of {', '.join(known)}")
