"""What `fit` and `plan` ask about a memory target, and what they make of the answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvprofile.cli.options import COUNT, SIZE
from kvprofile.errors import MismatchError

if TYPE_CHECKING:
    from kvprofile.planning.fit import Footprint, Target

F = TypeVar("F", bound=Callable[..., Any])

GIB = 2**30


def memory_options(*, required: bool) -> Callable[[F], F]:
    """The flags that say what has to fit into which memory."""
    options = (
        click.option("--memory", type=SIZE, required=required, help="Memory of the device, such as 24GB or 80GiB."),
        click.option("--context", type=COUNT, required=required, help="Tokens of each text, such as 32k (32,768)."),
        click.option(
            "--batch", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Texts at once."
        ),
        click.option(
            "--dtype", metavar="DTYPE", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."
        ),
        click.option("--weights", type=SIZE, help="Bytes of the weights, where they are quantised."),
        click.option(
            "--reserve", type=SIZE, default="1GiB", show_default=True, help="Left free: CUDA's context, fragmentation."
        ),
        click.option(
            "--piece",
            type=COUNT,
            default="2k",
            show_default=True,
            help="Tokens of a prompt read at once: generate's prefill_chunk_size.",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):  # a decorator puts its flag before those already there
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True)
class Wanted:
    """The answers: what has to fit, the model's configuration and its footprint, and the name of its dtype."""

    target: "Target"
    config: Any
    footprint: "Footprint"
    dtype: str


def wanted(model: str, options: dict[str, Any], log: Callable[[str], None]) -> Wanted:
    """Read the configuration of `model` for the `memory_options`; no weights are read.

    Raises UsageError for a dtype that is none, KVProfileError where the configuration is not to be had.
    """
    from kvprofile.models.device_and_dtype import check_placement
    from kvprofile.models.load import load_config
    from kvprofile.planning.fit import Target, footprint_of

    check_placement("auto", options["dtype"], None)
    config = load_config(model, options["revision"], log=log)
    number = _dtype(config, options["dtype"])
    target = Target(*(options[name] for name in ("memory", "context", "batch", "reserve", "piece")))
    footprint = footprint_of(config, number, weights=options["weights"])
    return Wanted(target, config, footprint, str(number).removeprefix("torch."))


def too_large(missing: int) -> MismatchError:
    """Nothing fits: what would help."""
    return MismatchError(
        f"no budget fits: weights, activations and the smallest cache take {gib(missing)} more than there is; ask for a "
        "shorter --context, a smaller --batch or --piece, or quantise the weights (--weights SIZE)"
    )


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:,.2f} GiB"


def _dtype(config: Any, asked: str) -> Any:
    """What numbers are kept in: as asked, else as the checkpoint has them where that is half precision, else bfloat16."""
    import torch

    from kvprofile.models.device_and_dtype import stored_dtype

    if asked != "auto":
        return getattr(torch, asked)
    stored = stored_dtype(config)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
