"""Flags that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# Kept in step with the modules they name by a test: importing those here would load torch.
POLICY_NAMES = (
    "auto",
    "gauss",
    "attention",
    "absorb",
    "gather",
    "gather-mended",
    "average",
    "pivot",
    "pivot-key",
    "kvmerger",
    "kvmerger-printed",
    "h2o",
    "value-attention",
    "snapkv",
    "snapkv-128",
    "streaming",
    "cam",
    "cam-drawn",
    "d2o",
    "look-m-average",
    "look-m-pivot",
    "look-m-weighted",
    "keepkv",
    "zsmerge",
    "keydiff",
    "nestedkv",
    "expected-attention",
    "grkv",
    "random",
    "gauss-off",
    "absorb-off",
    "pivot-off",
    "kvmerger-off",
    "zsmerge-off",
)
PLAN_FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "rule": (
        ("damage", "uniform", "common", "pyramidkv", "dynamickv", "prefixkv", "cake", "squeeze"),
        "How the budget is spent: by measured damage, alike, by one threshold for all, or as published.",
    ),
    "objective": (
        ("balanced", "recall", "continuation", "all"),
        "Which damage counts: of looking back, of going on, both, or planted lines (--probes) as well.",
    ),
    "granularity": (("head", "layer"), "What gets a share of its own: every KV head or every layer."),
    "mode": (("exact", "threshold"), "Meet shares to the slot, or let slots emerge from thresholds."),
}


def model_options(command: F) -> F:
    """The flags that say how a model is loaded."""
    options = (
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
        click.option(
            "--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto."
        ),
        click.option(
            "--dtype", metavar="DTYPE", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."
        ),
        click.option("--device-map", metavar="MAP", help="Spread a large model with accelerate, for example auto."),
        click.option("--allow-pickle", is_flag=True, help="Load weights from pickle files, which can run code."),
    )
    for option in reversed(options):  # a decorator puts its flag before those already there
        command = option(command)
    return command


def speech_options(command: F) -> F:
    """How much is said on stderr while a command works: -q and -v."""
    loud = click.option("-v", "--verbose", is_flag=True, help="Also the text, times, memory and library warnings.")
    return click.option("-q", "--quiet", is_flag=True, help="No progress, no messages; only warnings and errors.")(
        loud(command)
    )


def plan_options(command: F) -> F:
    """The flags that say how the budget is spent; unset ones are left to the call."""
    for name, (choices, text) in reversed(PLAN_FLAGS.items()):
        command = click.option(f"--{name}", type=click.Choice(choices), help=text)(command)
    return command


def plan_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Take the plan's flags that were given out of `options`."""
    taken = {name: options.pop(name) for name in PLAN_FLAGS}
    return {name: value for name, value in taken.items() if value is not None}


def budget_of(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """Check --budget while the flags are read (a click callback)."""
    from kvprofile.solve import check_budget

    return check_budget(value)


def shard_of(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Read --shard (a click callback): `2/8` is (2, 8), the second eighth."""
    from kvprofile.errors import UsageError

    if value is None:
        return None
    number, _, shards = value.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise UsageError(
            f"--shard {value} is no share of the samples; expected I/N with I from 1 to N, for example 2/8"
        )
    return int(number), int(shards)
