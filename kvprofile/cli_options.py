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
)
PLAN_FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "shares": (("damage", "uniform", "common"), "By measured damage, the same for all, or one threshold for all."),
    "objective": (("balanced", "recall", "continuation"), "Which damage counts."),
    "granularity": (("head", "layer"), "What gets a share of its own."),
    "mode": (("exact", "threshold"), "Meet shares to the slot, or let slots emerge from thresholds."),
}


def model_options(command: F) -> F:
    """The flags that say how a model is loaded."""
    for option in (
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto."),
        click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."),
        click.option("--device-map", metavar="MAP", help="Spread a large model with accelerate, for example auto."),
        click.option("--allow-pickle", is_flag=True, help="Load weights from pickle files, which can run code."),
    ):
        command = option(command)
    return command


def plan_options(command: F) -> F:
    """The flags that say how the budget is spent; unset ones are left to the call."""
    for name, (choices, text) in PLAN_FLAGS.items():
        command = click.option(f"--{name}", type=click.Choice(choices), help=text)(command)
    return command


def plan_choices(options: dict[str, Any]) -> dict[str, str]:
    """Take the plan's flags that were given out of `options`."""
    taken = {name: options.pop(name) for name in PLAN_FLAGS}
    return {name: value for name, value in taken.items() if value is not None}
