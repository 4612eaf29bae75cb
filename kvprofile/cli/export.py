"""`kvprofile export`: a profile's plan for another tool."""

from pathlib import Path

import click

from kvprofile.cli.common import check_writable, log_of
from kvprofile.cli.options import quiet_option
from kvprofile.errors import UsageError


@click.command(short_help="Write a PROFILE for other programs.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(("kvpress", "vllm", "kvtuner")), required=True, help="The tool.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--bits", type=float, help="kvtuner: mean bits of a number.  [default: 4]")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@quiet_option
def export(profile: Path, target: str, output: Path, bits: float | None, force: bool, quiet: bool) -> None:
    """Write the plan of a PROFILE, or what it measured, for another tool.

    kvpress takes one number per layer, the fraction of tokens removed: shares are averaged over a layer's heads, and
    policies, thresholds and biases stay behind (docs/kvpress.md). vllm gets the layers that should keep 16 bits where its
    cache is in 8 bits, by measured damage, and kvtuner its table, 8, 4 or 2 bits for every layer's keys and values, the
    least damage at a mean of --bits: shares stay behind (docs/serving.md).

    \b
    Examples:
      kvprofile export profile.json --to kvpress -o ratios.json
      kvprofile export profile.json --to vllm -o engine.json
      kvprofile export profile.json --to kvtuner --bits 3.25 -o bits.yaml
    """
    from kvprofile.files import atomic_write
    from kvprofile.profile.export import FORMATS
    from kvprofile.profile.storage import load_profile

    check_writable(output, force)
    if bits is not None and target != "kvtuner":
        raise UsageError(f"--bits is for --to kvtuner; leave it out for {target}")
    options = {} if bits is None else {"bits": bits}
    atomic_write(output, FORMATS[target](load_profile(profile), **options))
    log_of(quiet)(f"Wrote {output}")
