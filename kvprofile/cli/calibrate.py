"""`kvprofile calibrate`: measure a model, solve, check, write a profile."""

from pathlib import Path
from typing import Any

import click

from kvprofile.cli.calibrating import Request, output_of
from kvprofile.cli.calibrating import calibrate as run
from kvprofile.cli.common import check_verbosity, say, warn
from kvprofile.cli.options import (
    BUDGET,
    BYTES,
    BYTES_HELP,
    check_one_of,
    complete_model,
    model_options,
    plan_choices,
    plan_options,
    shard_of,
    speech_options,
)
from kvprofile.names import POLICY_NAMES


@click.command(short_help="Measure MODEL and write its profile.")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--budget",
    type=BUDGET,
    metavar="SHARE",
    help="Share of KV slots to keep, above 0 and at most 1.  [default: 0.5]",
)
@click.option("--bytes", "size", type=BYTES, metavar="SHARE", help=BYTES_HELP)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The profile to write.  [default: MODEL.json]")
@click.option("--report", is_flag=True, help="Also write the report, as .html beside the profile.")
@click.option("--data", default="builtin", show_default=True, metavar="TEXT", help="Calibration text; see above.")
@click.option("--column", metavar="NAME", help="Column of a .jsonl, .csv, .parquet or hub data set.")
@click.option(
    "--samples", type=click.IntRange(1), metavar="N", default=8, show_default=True, help="Samples to measure."
)
@click.option(
    "--held-out",
    type=click.IntRange(0),
    metavar="N",
    default=6,
    show_default=True,
    help="Other samples, for the check.",
)
@click.option(
    "--tokens", type=click.IntRange(64), metavar="N", default=2048, show_default=True, help="Tokens of each sample."
)
@click.option(
    "--policy",
    type=click.Choice(POLICY_NAMES),
    metavar="NAME",
    default="auto",
    show_default=True,
    help="How tokens give up their slots: auto lets every head choose; the names are in docs/policies.md.",
)
@click.option(
    "--codec",
    metavar="NAMES",
    default="auto",
    show_default=True,
    help="Codecs to measure, for --bytes now or later: auto, none, or NAME[,NAME...]; see docs/bytes.md.",
)
@plan_options
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the samples' places and the probes."
)
@click.option(
    "--probes", metavar="MIX", default="", help="What is read from the merged cache, such as lookups=8; see above."
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan and the check as JSON on stdout.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted or killed.")
@click.option(
    "--shard",
    metavar="I/N",
    callback=shard_of,
    help="Only measure share I of N of the samples, for kvprofile merge.",
)
@click.option("--dry-run", is_flag=True, help="Only tell tokens, time and memory it would take; loads no weights.")
@speech_options
@model_options
def calibrate(
    model: str,
    budget: float | None,
    size: float | None,
    output: Path | None,
    report: bool,
    data: str,
    column: str | None,
    samples: int,
    held_out: int,
    tokens: int,
    policy: str,
    codec: str,
    seed: int,
    probes: str,
    force: bool,
    as_json: bool,
    resume: bool,
    shard: tuple[int, int] | None,
    dry_run: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure MODEL, solve for a budget, check the plan and write a profile.

    MODEL is an alias (`kvprofile models`), a local folder, a .gguf file or a hub id.

    \b
    --data takes:
      builtin                  prose and code that ship with Python, and generated encyclopedia entries
      FILE or FOLDER           .txt .md .py .jsonl .json .csv .parquet
      synthwiki:FILE           the SynthWiki csv
      longbench:TASK[:FOLDER]  a LongBench task
      ORG/NAME                 a hub data set

    \b
    --probes takes any of these, with the numbers they have otherwise:
      passages=16,passage_tokens=20,continuation_tokens=64,facts=0,lookups=0

    \b
    Examples:
      kvprofile calibrate smollm2-135m --budget 0.5 -o profile.json --report
      kvprofile calibrate smollm2-135m --bytes 0.25 -o profile.json
      kvprofile calibrate ./my-llama --data corpus.jsonl --column text --samples 32 --tokens 4096
      kvprofile calibrate ./my-llama --tokens 4096 --dry-run
      torchrun --nproc-per-node 8 -m kvprofile calibrate ./my-llama -o profile.json
      kvprofile calibrate ./my-llama --shard 2/8 -o profile.json

    Every sample's statistics are kept in the folder PROFILE.partial, from which --resume goes on; it is removed when
    the profile is written. Under torchrun the processes share the samples: docs/many-gpus.md.
    """
    check_verbosity(quiet, verbose)
    check_one_of(budget, size)
    choices = plan_choices(options)
    if dry_run:
        text = {"samples": samples, "held_out": held_out, "tokens": tokens}
        _estimate(model, options, policy, codec, choices, probes, as_json, text)
        return
    run(
        Request(
            model=model,
            budget=budget,
            size=size,
            output=output or output_of(model),
            report=report,
            data=data,
            column=column,
            samples=samples,
            held_out=held_out,
            tokens=tokens,
            policy=policy,
            codec=codec,
            seed=seed,
            probes=probes,
            force=force,
            as_json=as_json,
            resume=resume,
            shard=shard,
            quiet=quiet,
            verbose=verbose,
            choices=choices,
            options=options,
        )
    )


def _estimate(
    model: str,
    options: dict[str, Any],
    policy: str,
    codec: str,
    choices: dict[str, Any],
    probes: str,
    as_json: bool,
    text: dict[str, Any],
) -> None:
    """Print what the run would cost, from the model's configuration alone."""
    from kvprofile.calibration.calibrate import candidates_for, codecs_for
    from kvprofile.calibration.estimate import estimate
    from kvprofile.calibration.probe_mix import ProbeMix
    from kvprofile.models.context_length import beyond_context, longest_text
    from kvprofile.models.load import load_config
    from kvprofile.report import terminal

    mix = ProbeMix.parse(probes)
    config = load_config(model, options["revision"], log=say)
    if message := beyond_context(
        longest_text(config), text["tokens"] + mix.tokens, "samples and what is read after them take"
    ):
        warn(message)
    candidates = candidates_for(policy, choices.get("rule"))
    placed = {name: options[name] for name in ("device", "dtype", "device_map")}
    codecs = codecs_for(codec, candidates)
    told = estimate(config, candidates=candidates, codecs=codecs, mix=mix, **placed, **text)
    terminal.estimate(model, told, as_json)
