"""`kvprofile generate`: text from a model whose cache is merged."""

from pathlib import Path
from typing import Any

import click

from kvprofile.cli.common import check_model, check_verbosity, load, log_of, warn
from kvprofile.cli.options import complete_model, model_options, speech_options
from kvprofile.errors import KVProfileError, UsageError
from kvprofile.names import MODES


@click.command(short_help="Generate text with MODEL and a merged cache.")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Merge the cache as this profile says.  [default: the full cache]",
)
@click.option("--prompt", metavar="TEXT", help="The prompt itself.")
@click.option(
    "--prompt-file", metavar="FILE", type=click.File(encoding="utf-8"), help="Read the prompt from a file, - for stdin."
)
@click.option(
    "--chat/--raw",
    default=None,
    help="Put the prompt into the tokenizer's chat template, or read it as it is.  [default: chat where there is one]",
)
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Stop after so many tokens, or where the model ends.",
)
@click.option("--mode", type=click.Choice(MODES), help="Override the plan's mode.")
@click.option("--sample", is_flag=True, help="Sample instead of taking the most likely token.")
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Seed for --sample.")
@click.option("--json", "as_json", is_flag=True, help="Print text, slots and bytes as JSON on stdout.")
@speech_options
@model_options
def generate(
    model: str,
    profile: Path | None,
    prompt: str | None,
    prompt_file: Any,
    chat: bool | None,
    max_new_tokens: int,
    mode: str | None,
    sample: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Generate text with MODEL, its cache merged as a profile says.

    The text goes to stdout; slots and bytes of the cache to stderr.

    \b
    Example:
      kvprofile generate smollm2-135m --profile profile.json --prompt-file long.txt --max-new-tokens 64
    """
    check_verbosity(quiet, verbose)
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt with exactly one of --prompt and --prompt-file")
    from kvprofile.profile.storage import load_profile

    text = prompt if prompt is not None else prompt_file.read()
    if not text:
        raise KVProfileError("the prompt is empty; give some text with --prompt or --prompt-file")
    check_model(model, options)
    if profile is not None:
        load_profile(profile)  # what is wrong with it is told before torch and the model are loaded
    from kvprofile.generation import generate as run
    from kvprofile.report import terminal

    loaded = load(model, options, log_of(quiet), verbose=verbose)
    result = run(
        loaded.model,
        loaded.tokenizer,
        text,
        profile=profile,
        max_new_tokens=max_new_tokens,
        chat=chat,
        mode=mode,
        seed=seed if sample else None,
        warn=warn,
    )
    if as_json:
        click.echo(terminal.generation_as_json(result))
    else:
        click.echo(result.text)
        log_of(quiet)(result.summary())
