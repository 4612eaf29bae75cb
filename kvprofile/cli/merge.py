"""`kvprofile merge`: one profile of what several machines have measured."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import check_verbosity, check_writable, load, log_of, say, track_of, warn
from kvprofile.cli.options import (
    BUDGET,
    BYTES,
    BYTES_HELP,
    check_one_of,
    complete_model,
    model_options,
    plan_choices,
    plan_options,
    speech_options,
)
from kvprofile.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from kvprofile.calibration.measure.statistics import Measurements
    from kvprofile.calibration.runs import Run
    from kvprofile.profile.profile import Profile


@click.command(short_help="Join the shards of a calibration.")
@click.argument("partials", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The profile to write.")
@click.option(
    "--budget",
    type=BUDGET,
    metavar="SHARE",
    help="Share of KV slots to keep, above 0 and at most 1.  [default: 0.5]",
)
@click.option("--bytes", "size", type=BYTES, metavar="SHARE", help=BYTES_HELP)
@plan_options
@click.option(
    "--check",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Load this model, the one that was measured, and check the plan.",
)
@click.option("--data", default="builtin", show_default=True, metavar="TEXT", help="The text that was measured.")
@click.option("--column", metavar="NAME", help="Its column, as for calibrate.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan and the check as JSON on stdout.")
@speech_options
@model_options
def merge(
    partials: tuple[Path, ...],
    output: Path,
    budget: float | None,
    size: float | None,
    check: str | None,
    data: str,
    column: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Join PARTIALS, the folders that `calibrate --shard` has written, into one profile.

    The statistics are, byte for byte, those of one process that measures all samples. Neither the model nor a GPU is
    needed; without them the plan is not checked on held-out text, and the profile says so. --check MODEL makes the check:
    --data, --column and --dtype are then those of the measuring.

    \b
    Examples:
      kvprofile merge profile.partial -o profile.json
      kvprofile merge node1/p.partial node2/p.partial -o profile.json --budget 0.25
      kvprofile merge p.partial -o profile.json --check ./my-llama --data corpus.jsonl --column text
    """
    from kvprofile.calibration.assemble import make_profile
    from kvprofile.calibration.partials import join
    from kvprofile.profile.storage import save_profile
    from kvprofile.report import terminal
    from kvprofile.report.budgets import costs

    started = time.perf_counter()
    check_verbosity(quiet, verbose)
    check_one_of(budget, size)
    choices = plan_choices(options)
    for file in (output, output.with_suffix(".safetensors")):
        check_writable(file, force)
    run, statistics = join(partials)
    command = shlex.join(["kvprofile", *sys.argv[1:]])
    profile, arrays = make_profile(run, statistics, budget, bytes=size, command=command, **choices)
    if check is not None:
        text = {"data": data, "column": column}
        profile = _checked(
            profile, arrays, run, statistics, model=check, text=text, options=options, quiet=quiet, verbose=verbose
        )
    seconds = round(time.perf_counter() - started, 1)
    profile = profile.model_copy(update={"created": profile.created.model_copy(update={"seconds": seconds})})
    profile, written = save_profile(profile, arrays, output, force=force)
    if as_json:
        click.echo(terminal.as_json(profile))
    if not quiet:
        terminal.verdict(profile, costs(profile, arrays))
        for path in written:
            say(f"Wrote {path}")


def _checked(
    profile: "Profile",
    arrays: "dict[str, np.ndarray]",
    run: "Run",
    statistics: "Measurements",
    *,
    model: str,
    text: dict[str, Any],
    options: dict[str, Any],
    quiet: bool,
    verbose: bool,
) -> "Profile":
    """The profile with its check, made with the model and text that were measured."""
    from kvprofile.calibration.runs import check_same
    from kvprofile.evaluate.check import check_profile
    from kvprofile.samples import load_documents, make_samples

    facts = run.calibration
    if not facts.held_out.samples:
        raise UsageError(
            "the partials were measured with --held-out 0, so there is no text to check on; leave --check out"
        )
    documents = load_documents(text["data"], column=text["column"], seed=facts.seed)
    dtype = facts.dtype if options["dtype"] == "auto" else options["dtype"]
    loaded = load(model, {**options, "dtype": dtype}, log_of(quiet), verbose=verbose)
    samples = make_samples(
        documents,
        loaded.tokenizer,
        samples=run.samples,
        tokens=facts.measured.tokens,
        held_out=facts.held_out.samples,
        continuation=256,
        seed=facts.seed,
    )
    check_same(run, loaded, samples)
    return check_profile(
        loaded.model,
        profile,
        None if statistics.damage is None else statistics.damage.moments.mean,
        samples.held_out,
        arrays=arrays,
        seed=facts.seed,
        track=track_of(quiet),
        warn=warn,
    )
