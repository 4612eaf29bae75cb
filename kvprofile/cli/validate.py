"""`kvprofile validate`: whether a profile is sound and fits a model."""

from pathlib import Path

import click

from kvprofile.cli.common import log_of
from kvprofile.cli.options import complete_model, quiet_option


@click.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Also check that it fits this model: an alias, folder, file or hub id.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@quiet_option
def validate(profile: Path, model: str | None, revision: str | None, quiet: bool) -> None:
    """Check that a PROFILE is sound and fits a model. Exit code 3 if it does not.

    The JSON must follow the schema, and the arrays beside it must be those it was saved with. Of the model only the
    configuration is read.

    \b
    Examples:
      kvprofile validate profile.json
      kvprofile validate profile.json --model smollm2-135m
    """
    from kvprofile.models.load import load_config
    from kvprofile.profile.fingerprint import model_facts
    from kvprofile.profile.storage import load_arrays, load_profile

    loaded = load_profile(profile)
    if loaded.statistics.arrays is not None:
        load_arrays(loaded, profile)
    if model is None:
        click.echo(f"{profile} is valid")
        return
    loaded.check_model(model_facts(load_config(model, revision, log=log_of(quiet))))
    click.echo(f"{profile} is valid and fits {model}")
