"""`kvprofile report`: a profile as a page to look at."""

from pathlib import Path

import click

from kvprofile.cli.common import check_writable, log_of
from kvprofile.cli.options import quiet_option
from kvprofile.errors import UsageError


@click.command(short_help="Show a PROFILE, or two side by side, as one HTML page.")
@click.argument("profiles", metavar="PROFILE [OTHER]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page to write.  [default: PROFILE.html]")
@click.option(
    "--figures", type=click.Path(path_type=Path), metavar="DIR", help="Also write the figures as PNG and SVG."
)
@click.option("--layers", metavar="I,J,...", help="Layers to draw similarity maps of.  [default: six, spread evenly]")
@click.option("--heads", metavar="I,J,...", help="KV heads to draw.  [default: the first, or one for each layer]")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@quiet_option
def report(
    profiles: tuple[Path, ...],
    output: Path | None,
    figures: Path | None,
    layers: str | None,
    heads: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Show a PROFILE, or two side by side, as one HTML page that opens without a network.

    The verdict, the plan, damage against budget, similarity of keys, compression ratios, and what other budgets
    would cost. Where the arrays file is not beside a profile, the page says what it lacks.

    \b
    Examples:
      kvprofile report profile.json -o report.html
      kvprofile report profile.json --figures figures --layers 0,7,14 --heads 0,1
      kvprofile report half.json quarter.json -o both.html
    """
    from kvprofile.report.figures import write_figures
    from kvprofile.report.html import read_subject, write_report

    if len(profiles) > 2:
        raise UsageError(f"report takes one profile or two, not {len(profiles)}; leave some out")
    output = output or _page_of(profiles[0])
    check_writable(output, force)
    chosen = _indices("--layers", layers), _indices("--heads", heads)
    subjects = [read_subject(path, layers=chosen[0], heads=chosen[1]) for path in profiles]
    written = [] if figures is None else write_figures(subjects, figures, force=force)
    for path in [write_report(subjects, output, force=force), *written]:
        log_of(quiet)(f"Wrote {path}")


def _page_of(profile: Path) -> Path:
    """Beside a file; of a profile that comes by its name or from the hub, here."""
    folder = profile.parent if profile.exists() else Path()
    return folder / f"{profile.name.removesuffix('.json')}.html"


def _indices(flag: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a list of numbers; expected for example 0,7,14") from None
