"""`kvprofile doctor`: what there is, and what is wrong with it."""

import click


@click.command(short_help="Print versions, devices, caches and problems.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON on stdout.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Print versions, devices, caches, what is reachable, and problems. Exit code 1 if there are any.

    Asks the hub whether it answers, for three seconds at most. The output belongs into a bug report.
    """
    from kvprofile import terminal
    from kvprofile.doctor import examine

    found = examine()
    terminal.doctor(found, as_json)
    if found.problems:
        ctx.exit(1)
