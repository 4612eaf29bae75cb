"""`kvprofile push`: put a profile on the hub."""

from pathlib import Path

import click

from kvprofile.cli.common import log_of
from kvprofile.cli.options import quiet_option


@click.command(short_help="Put a PROFILE on the hub.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one, where it is new.")
@click.option("--force", is_flag=True, help="Replace the profile that lies there.")
@quiet_option
def push(profile: Path, repository: str, private: bool, force: bool, quiet: bool) -> None:
    """Put a PROFILE, its arrays and a model card with the plan's picture into the hub's repository ORG/NAME.

    The repository is made if need be. Log in with `hf auth login` first. Wherever a profile is taken, hub:ORG/NAME then
    works, or hub:ORG/NAME@REVISION.

    \b
    Examples:
      kvprofile push profile.json my-name/llama3.1-8b-kv
      kvprofile generate llama3.1-8b --profile hub:my-name/llama3.1-8b-kv --prompt-file long.txt
    """
    from kvprofile.profile import hub
    from kvprofile.profile.storage import load_arrays, load_profile
    from kvprofile.report.hub_card import card_files

    place = hub.repository(repository).location
    loaded = load_profile(profile)
    beside = card_files(loaded, load_arrays(loaded, profile), place)
    log_of(quiet)(f"Wrote {hub.push(loaded, profile, repository, beside=beside, private=private, force=force)}")
