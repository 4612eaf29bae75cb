"""Flags that several commands share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvprofile.names import BUDGET_RULES, GRANULARITIES, MODES, OBJECTIVES
from kvprofile.quantities import parse_count, parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

# Their sets need thresholds that only a calibration with them measures.
CALIBRATED_WITH = ("kvmerger", "kvmerger-printed", "kvmerger-off")
PLAN_FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "rule": (
        BUDGET_RULES,
        "How the budget is spent: by measured damage, alike, by one threshold for all, or as published.",
    ),
    "objective": (
        OBJECTIVES,
        "Which damage counts: of looking back, of going on, both, or planted lines (--probes) as well.",
    ),
    "granularity": (GRANULARITIES, "What gets a share of its own: every KV head or every layer."),
    "mode": (MODES, "Meet shares to the slot, or let slots emerge from thresholds."),
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


BYTES_HELP = "Share of the bytes to keep instead, spent on slots and on bits."


class Share(click.ParamType):
    """A share of the slots or of the bytes; 50 and 50% are told alike to be 0.5."""

    name = "share"

    def __init__(self, what: str, of: str, example: float) -> None:
        self.what, self.of, self.example = what, of, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number; raises UsageError for a number that is none."""
        from kvprofile.errors import UsageError
        from kvprofile.planning.reach import check_budget, check_bytes

        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(
                f"{value!r} is not a number; expected a share above 0 and at most 1, for example {self.example:g}",
                param,
                ctx,
            )
        if text.endswith("%") or 1 < number <= 100:
            raise UsageError(
                f"{self.what} {text} is not a fraction of {self.of}; expected above 0 and at most 1, for example "
                f"{self.example:g}; {number:g}% is {number / 100:g}"
            )
        return (check_budget if self.what == "budget" else check_bytes)(number)


BUDGET = Share("budget", "slots to keep", 0.5)
BYTES = Share("bytes", "the stock cache's bytes", 0.25)


def check_one_of(budget: float | None, size: float | None) -> None:
    """Raise UsageError where both --budget and --bytes were given."""
    from kvprofile.errors import UsageError

    if budget is not None and size is not None:
        raise UsageError("--budget is the share of the slots, --bytes that of the bytes; give one of them")


class Size(click.ParamType):
    """Bytes, as people write them."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes; raises UsageError."""
        return value if isinstance(value, int) else parse_size(value)


class Count(click.ParamType):
    """Tokens, as people write them."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of tokens; raises UsageError."""
        return value if isinstance(value, int) else parse_count(value)


SIZE, COUNT = Size(), Count()


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The aliases that begin so, and the files."""
    from click.shell_completion import CompletionItem

    from kvprofile.models.names import known_models

    found = [CompletionItem(alias.name) for alias in known_models() if alias.name.startswith(incomplete.lower())]
    return [*found, CompletionItem(incomplete, type="file")]


def quiet_option(command: F) -> F:
    """-q of a command that says little."""
    return click.option("-q", "--quiet", is_flag=True, help="No messages; only warnings and errors.")(command)


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
