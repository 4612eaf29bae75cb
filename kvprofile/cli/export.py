"""`kvprofile export`: a profile's plan for another tool."""

from pathlib import Path

import click

from kvprofile.cli.common import check_writable, log_of
from kvprofile.cli.options import quiet_option


@click.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(("kvpress", "vllm")), required=True, help="The tool.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The JSON file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@quiet_option
def export(profile: Path, target: str, output: Path, force: bool, quiet: bool) -> None:
    """Write the plan of a PROFILE for another tool.

    kvpress takes one number per layer, the fraction of tokens removed: shares are averaged over a layer's heads, and
    policies, thresholds and biases stay behind (docs/kvpress.md). vllm gets the layers that should keep 16 bits where its
    cache is in 8 bits, by measured damage; shares stay behind (docs/serving.md).

    \b
    Examples:
      kvprofile export profile.json --to kvpress -o ratios.json
      kvprofile export profile.json --to vllm -o engine.json
    """
    from kvprofile.files import atomic_write
    from kvprofile.profile.export import FORMATS
    from kvprofile.profile.storage import load_profile

    check_writable(output, force)
    atomic_write(output, FORMATS[target](load_profile(profile)))
    log_of(quiet)(f"Wrote {output}")
