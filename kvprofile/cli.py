"""The command line: flags, then one call each. Heavy imports stay inside command bodies, so that --help is instant."""

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from kvprofile import __version__
from kvprofile.cli_options import PLAN_FLAGS, POLICY_NAMES, model_options, plan_choices, plan_options
from kvprofile.errors import KVProfileError, UsageError

T = TypeVar("T")


class _Group(click.Group):
    """Turns our errors into one line and an exit code, and Ctrl-C into a quiet end."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVProfileError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. Nothing was written.", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kvprofile")
def main() -> None:
    """Measure where a model's KV cache can be merged, and merge it there.

    A calibration runs once per model and writes a profile; the profile is applied inside generate.

    \b
    Examples:
      kvprofile calibrate smollm2-135m --budget 0.5 -o profile.json --report
      kvprofile plan profile.json --budget 0.25 -o quarter.json
      kvprofile generate smollm2-135m --profile profile.json --prompt-file long.txt
    """


def _budget(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    from kvprofile.solve import check_budget

    return check_budget(value)


def _load(model: str, options: dict[str, Any], log: Callable[[str], None]) -> Any:
    import transformers

    from kvprofile.models import load_model

    transformers.logging.set_verbosity_error()
    return load_model(model, **options, log=log)


def _log(message: str) -> None:
    click.echo(message, err=True)


def _silent(_message: str) -> None:
    """Say nothing: for --quiet."""


@main.command()
@click.argument("model")
@click.option(
    "--budget", type=float, default=0.5, show_default=True, callback=_budget, help="Share of KV slots to keep."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The profile to write.  [default: MODEL.json]")
@click.option("--report", is_flag=True, help="Also draw plots into a folder beside the profile.")
@click.option("--data", default="builtin", show_default=True, help="Calibration text; see above.")
@click.option("--column", metavar="NAME", help="Column of a .jsonl, .csv, .parquet or hub data set.")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Calibration samples.")
@click.option("--held-out", type=click.IntRange(0), default=6, show_default=True, help="Samples for the check.")
@click.option("--tokens", type=click.IntRange(64), default=2048, show_default=True, help="Tokens of each sample.")
@click.option(
    "--policy",
    type=click.Choice(POLICY_NAMES),
    default="auto",
    show_default=True,
    help="How tokens give up their slots; auto lets every head choose.",
)
@plan_options
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan and the check as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no messages.")
@model_options
def calibrate(
    model: str,
    budget: float,
    output: Path | None,
    report: bool,
    data: str,
    column: str | None,
    samples: int,
    held_out: int,
    tokens: int,
    policy: str,
    seed: int,
    force: bool,
    as_json: bool,
    quiet: bool,
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
    Examples:
      kvprofile calibrate smollm2-135m --budget 0.5 -o profile.json --report
      kvprofile calibrate ./my-llama --data corpus.jsonl --column text --samples 32 --tokens 4096
    """
    output = output or Path(f"{Path(model).name.removesuffix('.gguf')}.json")
    if output.suffix == ".safetensors":
        raise UsageError(f"-o {output} is the name the arrays would get; give the profile a name that ends in .json")
    for file in (output, output.with_suffix(".safetensors")):
        _check_writable(file, force)
    from kvprofile import terminal
    from kvprofile.calibration import calibrate as run
    from kvprofile.samples import load_documents, make_samples
    from kvprofile.storage import save_profile

    log = _silent if quiet else _log
    choices = plan_choices(options)
    documents = load_documents(data, column=column, seed=seed)
    loaded = _load(model, options, log)
    blocks = make_samples(
        documents, loaded.tokenizer, samples=samples, tokens=tokens, held_out=held_out, continuation=256, seed=seed
    )
    profile, arrays = run(
        loaded,
        blocks,
        budget=budget,
        policy=policy,
        seed=seed,
        command=shlex.join(["kvprofile", *sys.argv[1:]]),
        track=_track(quiet),
        warn=lambda message: _log(f"Warning: {message}"),
        **choices,
    )
    profile, written = save_profile(profile, arrays, output, force=force)
    if report:
        from kvprofile.report.plots import write_plots

        written += write_plots(profile, arrays, output.with_name(f"{output.stem}-report"))
    if as_json:
        click.echo(terminal.as_json(profile))
    if not quiet:
        terminal.verdict(profile)
        for path in written:
            click.echo(f"Wrote {path}", err=True)


@main.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--budget", type=float, required=True, callback=_budget, help="Share of KV slots to keep.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The profile to write.")
@click.option("--policy", help="auto, or a policy the profile holds.")
@plan_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(
    profile: Path,
    budget: float,
    output: Path,
    policy: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Solve a PROFILE for another budget. Needs neither the model nor a GPU.

    What is not given stays as it was. The check is left out of the new profile: it was measured for the old plan.

    \b
    Example:
      kvprofile plan profile.json --budget 0.25 -o quarter.json
    """
    from kvprofile import terminal
    from kvprofile.plans import replan
    from kvprofile.storage import carry_arrays, load_arrays, load_profile

    _check_writable(output, force)
    loaded = load_profile(profile)
    damage = load_arrays(loaded, profile)["damage_mean"] if loaded.statistics.damage else None
    planned = replan(loaded, damage, budget, policy=policy, **plan_choices(options))
    carry_arrays(planned, profile, output)
    planned.save(output, force=force)
    if as_json:
        click.echo(terminal.as_json(planned))
    click.echo(f"Wrote {output}", err=True)


@main.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print model, plan, check and persistence as JSON.")
def show(profile: Path, as_json: bool) -> None:
    """Print what a PROFILE says: the plan by layer, the check, the persistence.

    \b
    Example:
      kvprofile show profile.json
    """
    from kvprofile import terminal
    from kvprofile.storage import load_profile

    loaded = load_profile(profile)
    if as_json:
        click.echo(terminal.as_json(loaded))
    else:
        terminal.show(loaded)


@main.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the plots.  [default: PROFILE-report]"
)
@click.option("--layers", metavar="I,J,...", help="Layers to draw similarity maps of.  [default: six, spread evenly]")
@click.option("--heads", metavar="I,J,...", help="KV heads to draw.  [default: the first]")
def report(profile: Path, output: Path | None, layers: str | None, heads: str | None) -> None:
    """Draw a PROFILE as PNG: similarity heatmaps, compression ratio against threshold, the plan.

    \b
    Example:
      kvprofile report profile.json -o plots --layers 0,7,14 --heads 0,1
    """
    from kvprofile.report.plots import write_plots
    from kvprofile.storage import load_arrays, load_profile

    loaded = load_profile(profile)
    folder = output or profile.with_name(f"{profile.stem}-report")
    chosen = (_indices("--layers", layers, loaded.model.layers), _indices("--heads", heads, loaded.model.kv_heads))
    for path in write_plots(loaded, load_arrays(loaded, profile), folder, layers=chosen[0], heads=chosen[1]):
        click.echo(f"Wrote {path}", err=True)


@main.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--model", "model", required=True, help="The model to check the profile against.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
def validate(profile: Path, model: str, revision: str | None) -> None:
    """Check that a PROFILE is sound and fits a model. Exit code 3 if it does not.

    \b
    Example:
      kvprofile validate profile.json --model smollm2-135m
    """
    from kvprofile.fingerprint import model_facts
    from kvprofile.models import load_config
    from kvprofile.storage import load_arrays, load_profile

    loaded = load_profile(profile)
    if loaded.statistics.arrays is not None:
        load_arrays(loaded, profile)
    loaded.check_model(model_facts(load_config(model, revision, log=_log)))
    click.echo(f"{profile} is valid and fits {model}")


@main.command()
@click.argument("model")
@click.option("--profile", type=click.Path(path_type=Path), help="Merge the cache as this profile says.")
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", type=click.File(encoding="utf-8"), help="Read the prompt from a file, - for stdin.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--mode", type=click.Choice(PLAN_FLAGS["mode"][0]), help="Override the plan's mode.")
@click.option("--sample", is_flag=True, help="Sample instead of taking the most likely token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for --sample.")
@click.option("--json", "as_json", is_flag=True, help="Print text, slots and bytes as JSON on stdout.")
@model_options
def generate(
    model: str,
    profile: Path | None,
    prompt: str | None,
    prompt_file: Any,
    max_new_tokens: int,
    mode: str | None,
    sample: bool,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text with MODEL, its cache merged as a profile says.

    The text goes to stdout; slots and bytes of the cache to stderr.

    \b
    Example:
      kvprofile generate smollm2-135m --profile profile.json --prompt-file long.txt --max-new-tokens 64
    """
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt with exactly one of --prompt and --prompt-file")
    text = prompt if prompt is not None else prompt_file.read()
    from kvprofile import terminal
    from kvprofile.generate import generate as run

    loaded = _load(model, options, _log)
    result = run(loaded, text, profile=profile, max_new_tokens=max_new_tokens, mode=mode, seed=seed if sample else None)
    if as_json:
        click.echo(terminal.generation_as_json(result))
    else:
        click.echo(result.text)
        click.echo(result.summary(), err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on stdout.")
def models(as_json: bool) -> None:
    """List the model aliases. Any hub id, local folder or .gguf file works as well."""
    from kvprofile import terminal
    from kvprofile.model_names import known_models

    terminal.models(known_models(), as_json)


def _check_writable(path: Path, force: bool) -> None:
    """Find out before the work, not after it, that the result cannot be written."""
    from kvprofile.files import check_writable

    if path.exists() and not force:
        raise KVProfileError(f"{path} exists; give --force to replace it, or another -o")
    if path.is_dir():
        raise KVProfileError(f"{path} is a folder; give -o a file name")
    check_writable(path)


def _indices(flag: str, text: str | None, count: int) -> list[int] | None:
    if text is None:
        return None
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a list of numbers; expected for example 0,7,14") from None
    for index in chosen:
        if not 0 <= index < count:
            raise UsageError(f"{flag} {index} is out of range; the model has 0 to {count - 1}")
    return chosen


def _track(quiet: bool) -> Any:
    from tqdm import tqdm

    def track(items: Sequence[T], label: str) -> Iterable[T]:
        # disable=None: no bar where stderr is not a terminal.
        return tqdm(items, desc=label, unit="sample", disable=True if quiet else None)

    return track
