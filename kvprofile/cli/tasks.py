"""`kvprofile tasks`: the tasks of the evaluation."""

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on stdout.")
def tasks(as_json: bool) -> None:
    """List the tasks of kvprofile evaluate. Those that need a file take it after a colon: docs/evaluate.md."""
    from kvprofile.evaluate.tasks import TASKS
    from kvprofile.report import terminal

    rows = [{"task": name, "about": task.about, "score": task.metric} for name, task in TASKS.items()]
    terminal.named(rows, as_json)
