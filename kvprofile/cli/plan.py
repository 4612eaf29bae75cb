"""`kvprofile plan`: solve a profile for another budget."""

from pathlib import Path
from typing import Any

import click

from kvprofile.cli.common import check_writable
from kvprofile.cli.options import budget_of, plan_choices, plan_options


@click.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option(
    "--budget", type=float, metavar="SHARE", required=True, callback=budget_of, help="Share of KV slots to keep."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The profile to write.")
@click.option("--policy", metavar="NAME", help="auto, or the name of a policy; see docs/policies.md.")
@plan_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(
    profile: Path,
    budget: float,
    output: Path,
    policy: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Solve a PROFILE for another budget. Needs neither the model nor a GPU.

    What is not given stays as it was. The check is left out of the new profile: it was measured for the old plan.

    \b
    Examples:
      kvprofile plan profile.json --budget 0.25 -o quarter.json
      kvprofile plan profile.json --budget 0.25 --rule pyramidkv --policy snapkv -o pyramid.json
    """
    from kvprofile import terminal
    from kvprofile.plans import replan
    from kvprofile.rules import PUBLISHED
    from kvprofile.storage import load_arrays, load_profile, save_planned

    check_writable(output, force)
    loaded = load_profile(profile)
    choices = plan_choices(options)
    published = choices.get("rule", loaded.plan.rule) in PUBLISHED
    arrays = load_arrays(loaded, profile) if loaded.statistics.damage or published else {}
    planned = replan(loaded, arrays.get("damage_mean"), budget, policy=policy, measured=arrays, **choices)
    _, written = save_planned(planned, profile, output, force=force)
    if as_json:
        click.echo(terminal.as_json(planned))
    for path in written:
        click.echo(f"Wrote {path}", err=True)
