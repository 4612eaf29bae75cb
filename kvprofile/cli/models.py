"""`kvprofile models`: the model aliases."""

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on stdout.")
def models(as_json: bool) -> None:
    """List the model aliases. Any hub id, local folder or .gguf file works as well."""
    from kvprofile import terminal
    from kvprofile.model_names import known_models

    terminal.models(known_models(), as_json)
