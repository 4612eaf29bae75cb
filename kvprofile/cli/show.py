"""`kvprofile show`: what a profile says."""

from pathlib import Path

import click


@click.command(short_help="Print what a PROFILE says.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print model, plan, check and persistence as JSON.")
def show(profile: Path, as_json: bool) -> None:
    """Print what a PROFILE says: the plan by layer, the verdict, the persistence.

    \b
    Example:
      kvprofile show profile.json
    """
    from kvprofile.profile.storage import load_profile
    from kvprofile.report import terminal
    from kvprofile.report.budgets import arrays_beside, costs

    loaded = load_profile(profile)
    if as_json:
        click.echo(terminal.as_json(loaded))
    else:
        terminal.show(loaded, costs(loaded, arrays_beside(loaded, profile)))
