"""`kvprofile doctor`: what there is, and what is wrong with it."""

import click


@click.command(short_help="Print versions, devices, caches and problems, or try a device out.")
@click.option(
    "--device",
    metavar="DEVICE",
    help="Try this device out instead: auto, cpu, cuda, cuda:N or mps.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON on stdout.")
@click.pass_context
def doctor(ctx: click.Context, device: str | None, as_json: bool) -> None:
    """Print versions, devices, caches, what is reachable, and problems. Exit code 1 if there are any.

    Asks the hub whether it answers, for three seconds at most. The output belongs into a bug report.

    With --device, tiny random models are calibrated and generate there in every dtype of the device, and each back end is
    compared with attention in float64. Nothing is fetched; it takes less than a minute.
    """
    from kvprofile.report import terminal

    if device is not None:
        from kvprofile.doctor.selftest import self_test

        tried = self_test(device)
        terminal.self_test(tried, as_json)
        problems = tried.problems
    else:
        from kvprofile.doctor.environment import examine

        found = examine()
        terminal.doctor(found, as_json)
        problems = found.problems
    if problems:
        ctx.exit(1)
