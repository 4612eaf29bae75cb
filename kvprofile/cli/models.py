"""`kvprofile models`: the model aliases."""

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on stdout.")
def models(as_json: bool) -> None:
    """List the model aliases. Any hub id, local folder or .gguf file works as well."""
    from kvprofile.models.names import known_models
    from kvprofile.report import terminal

    terminal.models(known_models(), as_json)
