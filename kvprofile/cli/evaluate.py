"""`kvprofile evaluate`: a profile beside the field's policies at the same number of slots."""

import tomllib
from pathlib import Path
from typing import Any

import click

from kvprofile.cli.common import check_model, check_writable, load, log_of, track_of, warn
from kvprofile.cli.options import BUDGET, complete_model, model_options
from kvprofile.errors import KVProfileError, UsageError
from kvprofile.names import POLICY_NAMES

FIELD = ("h2o", "snapkv", "streaming", "kvmerger")
ALL = "all"
NONE = "none"
POLICIES = tuple(name for name in POLICY_NAMES if name != "auto")


def _configure(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Take flags from a TOML file; those on the command line win."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KVProfileError(f"cannot read {path}: {error}; give a TOML file with the flags' names as keys") from error
    flags = {flag.removeprefix("--"): parameter for parameter in ctx.command.params for flag in parameter.opts}
    unknown = [
        name for name in values if name not in flags or name == "config" or not isinstance(flags[name], click.Option)
    ]
    if unknown:
        raise UsageError(
            f"{path} sets {', '.join(unknown)}, which evaluate does not have; see kvprofile evaluate --help"
        )
    for name, value in values.items():
        if flags[name].multiple and not isinstance(value, list):
            raise UsageError(f"{path} sets {name} to {value!r}, expected a list")
    ctx.default_map = {str(flags[name].name): value for name, value in values.items()}


@click.command(short_help="Compare a profile with the field's policies.")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_configure,
    help="Read flags from a TOML file; flags given here win.",
)
@click.option(
    "--profile",
    "profiles",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="The profile to judge; give it again for others to compare with.",
)
@click.option(
    "--budget",
    "budgets",
    type=BUDGET,
    multiple=True,
    help="Share of slots, can be given again.  [default: the profile's]",
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice((ALL, NONE, *POLICIES)),
    metavar="NAME",
    multiple=True,
    default=FIELD,
    show_default=True,
    help="A policy spread evenly to compare with (docs/policies.md), all or none; can be given again.",
)
@click.option(
    "--data",
    "texts",
    multiple=True,
    default=("builtin",),
    show_default=True,
    help="Text for fidelity, as for calibrate, with KIND= in front to name it; can be given again.",
)
@click.option(
    "--documents",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Documents of each text; 0 leaves fidelity out.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=("encyclopedia",),
    show_default=True,
    help="A task, see above; can be given again.",
)
@click.option(
    "--examples",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Questions of each part of a task; 0 leaves tasks out.",
)
@click.option(
    "--tokens", type=click.IntRange(64), default=2048, show_default=True, help="Tokens of a context, at most."
)
@click.option(
    "--question",
    type=click.Choice(("after", "before")),
    default="after",
    show_default=True,
    help="Read the question after the compression, or compress it with the context.",
)
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of documents, questions and draws."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("evaluation.json"),
    show_default=True,
    help="The result; .md, .png and .rows.jsonl go beside it.",
)
@click.option(
    "--force", is_flag=True, help="Replace results that exist. Finished rows are still used where nothing changed."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no messages.")
@model_options
def evaluate(
    model: str,
    profiles: tuple[Path, ...],
    budgets: tuple[float, ...],
    policies: tuple[str, ...],
    texts: tuple[str, ...],
    documents: int,
    tasks: tuple[str, ...],
    examples: int,
    tokens: int,
    question: str,
    seed: int,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare a profile with other policies at the same number of slots, on fidelity and on tasks.

    Everything goes through the real cache: it is filled, compressed, and then read. An interrupted run goes on where it
    was when the same command is given again.

    \b
    --task takes:
      encyclopedia                   facts of generated articles, first, half-way and last
      needle[:FILE or FOLDER]        a fact at every depth of several lengths, drawn as a grid
      ruler[:KIND]                   multi-key, multi-value, variables
      key-value                      the value of one key of a JSON object
      synthwiki:FILE                 the SynthWiki csv
      longbench:TASK,TASK[:FOLDER]   LongBench's English and code tasks, or all; from FOLDER/TASK.jsonl or the hub
      zeroscrolls:TASK,TASK:FOLDER   ZeroSCROLLS' validation files, FOLDER/TASK/validation.jsonl

    \b
    Examples:
      kvprofile evaluate smollm2-135m --profile profile.json --budget 0.5 --budget 0.25
      kvprofile evaluate smollm2-135m --config bench.toml --task needle -o needle.json
    """
    for suffix in (".json", ".md", ".png"):
        if output.suffix != ".json":
            raise UsageError(f"-o {output} has to end in .json; its table and plots get the same name")
        check_writable(output.with_suffix(suffix), force)
    check_model(model, options)
    from kvprofile.evaluate.tasks import named_task
    from kvprofile.profile.storage import load_profile
    from kvprofile.samples.load import check_text, named_text

    for task in tasks if examples else ():
        named_task(task)
    for text in texts if documents else ():
        check_text(named_text(text)[1])
    for path in profiles:
        load_profile(path)
    from kvprofile.evaluate.results import results_of, write_results
    from kvprofile.evaluate.rows import open_store
    from kvprofile.evaluate.run import Choices
    from kvprofile.evaluate.run import evaluate as run

    log = log_of(quiet)
    store = open_store(output.with_suffix(".rows.jsonl"))
    chosen = POLICIES if ALL in policies else tuple(name for name in dict.fromkeys(policies) if name != NONE)
    choices = Choices(profiles, budgets, chosen, texts, documents, tasks, examples, tokens, question, seed)
    loaded = load(model, options, log)
    try:
        rows, facts = run(loaded, choices, store, track=track_of(quiet), log=log, warn=warn)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. Finished rows are in {store.path}; give the same command again to go on.", err=True)
        click.get_current_context().exit(130)
    results = results_of(rows, facts)
    paths = write_results(results, rows, output, judged=list(facts["profiles"])[:1])
    if as_json:
        import json

        click.echo(json.dumps({"facts": facts, "methods": results["methods"]}, indent=1))
    else:
        from kvprofile.evaluate.tables import main_table

        click.echo(main_table(results["methods"]))
    for path in paths:
        log(f"Wrote {path}")
