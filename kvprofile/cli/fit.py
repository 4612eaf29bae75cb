"""`kvprofile fit`: which budget fits a memory target."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import log_of
from kvprofile.cli.options import COUNT, SIZE, complete_model, quiet_option
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.names import NO_CODEC

if TYPE_CHECKING:
    from kvprofile.planning.fit import Fit, Footprint, Shares, Target

GIB = 2**30


@click.command(short_help="Tell which budget fits a memory target.")
@click.argument("model", shell_complete=complete_model)
@click.option("--memory", type=SIZE, required=True, help="Memory of the device, such as 24GB or 80GiB.")
@click.option("--context", type=COUNT, required=True, help="Tokens of each text, such as 32k (32,768).")
@click.option("--batch", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Texts at once.")
@click.option("--profile", type=click.Path(path_type=Path), help="Predict by this profile what the budget costs.")
@click.option(
    "--dtype", metavar="DTYPE", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."
)
@click.option("--weights", type=SIZE, help="Bytes of the weights, where they are quantised.")
@click.option(
    "--reserve", type=SIZE, default="1GiB", show_default=True, help="Left free: CUDA's context, fragmentation."
)
@click.option(
    "--piece",
    type=COUNT,
    default="2k",
    show_default=True,
    help="Tokens of a prompt read at once: generate's prefill_chunk_size.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print bytes, budget and rooms as JSON on stdout.")
@quiet_option
def fit(
    model: str,
    memory: int,
    context: int,
    batch: int,
    profile: Path | None,
    dtype: str,
    weights: int | None,
    reserve: int,
    piece: int,
    revision: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell which share of the slots fits into a device's memory, and with a profile what it costs.

    Works from MODEL's configuration: no weights are read, and the aliases (`kvprofile models`) need no network. Ends with
    exit code 3 where no budget fits.

    \b
    Examples:
      kvprofile fit llama3.1-8b --memory 24GB --context 32k --batch 4
      kvprofile fit smollm2-135m --memory 1GiB --context 8k --batch 8 --profile profile.json
    """
    from kvprofile.models.names import resolve

    resolve(model, revision)
    predicted = None if profile is None else _Predicted(profile)
    from kvprofile.models.device_and_dtype import check_placement
    from kvprofile.models.load import load_config
    from kvprofile.planning.fit import Target, footprint_of
    from kvprofile.planning.fit import fit as solve

    check_placement("auto", dtype, None)
    config = load_config(model, revision, log=log_of(quiet))
    number = _dtype(config, dtype)
    if predicted is not None:
        predicted.check(config)
    footprint = footprint_of(config, number, weights=weights)
    target = Target(memory, context, batch, reserve, piece)
    if predicted is None:
        found = solve(footprint, target)
    else:
        found = solve(footprint, target, shares_at=predicted.shares, lowest=predicted.lowest)
    cost = None if predicted is None or found.budget is None else predicted.cost(found.budget)
    name = str(number).removeprefix("torch.")
    if as_json:
        values = {"model": model, "dtype": name, **asdict(target), **asdict(found), "predicted_kl": cost}
        click.echo(json.dumps(values, indent=1))
    else:
        _show(f"{model} in {name}", footprint, target, found)
        if found.budget is not None:
            click.echo(_advice(model, profile, found.budget, cost))
    if found.budget is None:
        raise MismatchError(_too_large(found))


class _Predicted:
    """How the plan of a profile spends any budget, and what it predicts for it."""

    def __init__(self, path: Path) -> None:
        from kvprofile.planning.plans import solver_of
        from kvprofile.profile.storage import load_arrays, load_profile

        self.profile = load_profile(path)
        arrays = load_arrays(self.profile, path)
        if self.profile.statistics.damage is None:
            raise KVProfileError(f"{path} has no damage to predict by; calibrate anew, or leave --profile out")
        self.solver = solver_of(self.profile, arrays["damage_mean"], measured=arrays, codec=NO_CODEC, in_bytes=False)
        self.lowest = self._lowest()

    def check(self, config: Any) -> None:
        """Raise MismatchError unless the profile was made for the model with this configuration."""
        from kvprofile.profile.fingerprint import model_facts

        self.profile.check_model(model_facts(config))

    def shares(self, budget: float) -> "Shares":
        """The share of the slots of every head."""
        return self.solver.decide(budget).share

    def cost(self, budget: float) -> float:
        """Predicted KL in nats per token."""
        from kvprofile.planning.solver import total

        return 0.0 if budget >= 1 else total(self.solver.decide(budget)) or 0.0

    def _lowest(self) -> float:
        """The least budget that the plan can spend, in thousandths."""
        from kvprofile.planning.fit import smallest

        def works(step: int) -> bool:
            try:
                self.solver.decide(step / 1000)
            except MismatchError:
                return False
            return True

        return smallest(works, 1, 1000) / 1000


def _dtype(config: Any, asked: str) -> Any:
    """What numbers are kept in: as asked, else as the checkpoint has them where that is half precision, else bfloat16."""
    import torch

    from kvprofile.models.device_and_dtype import stored_dtype

    if asked != "auto":
        return getattr(torch, asked)
    stored = stored_dtype(config)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"


def _show(what: str, footprint: "Footprint", target: "Target", found: "Fit") -> None:
    texts = "one text" if target.batch == 1 else f"{target.batch} texts"
    lines = {
        "model": what,
        "target": f"{texts} of {target.context:,} tokens in {_gib(target.memory)}",
        "weights": _gib(found.weights),
        "activations": f"{_gib(found.activations)} (prompts read in pieces of {target.piece:,} tokens)",
        "reserve": _gib(found.reserve),
        "left": f"{_gib(found.left)} for the cache" if found.left > 0 else "nothing for the cache",
        "full cache": _gib(found.full),
    }
    if found.budget is not None:
        slots = "all slots" if found.budget == 1 else f"budget {found.budget:.3f}: that share of the slots"
        lines["fits"] = f"{slots}, a cache of {_gib(found.cache)}"
    for name, text in lines.items():
        click.echo(f"{name:<12} {text}")
    click.echo(
        f"{'budget':<12} {f'longest context, batch {target.batch}':<30} largest batch, {target.context:,} tokens"
    )
    for room in found.rooms:
        beyond = footprint.longest is not None and room.context > footprint.longest
        context = (
            f"{room.context:,}" + (f" (made for {footprint.longest:,})" if beyond else "") if room.context else "none"
        )
        click.echo(f"{room.budget:<12.2f} {context:<30} {room.batch or 'none'}")


def _advice(model: str, profile: Path | None, budget: float, cost: float | None) -> str:
    """What the budget costs, and what to type next."""
    if budget == 1:
        return "The full cache fits: nothing has to be merged."
    if profile is None:
        return f"No profile yet, so nothing is known of its cost: kvprofile calibrate {model} --budget {budget:.3f}"
    return (
        f"Predicted KL {cost:.2g} nats per token, by the profile's curves: on text like its calibration's, of that length.\n"
        f"Next: kvprofile plan {profile} --budget {budget:.3f} -o planned.json"
    )


def _too_large(found: "Fit") -> str:
    missing = _gib(found.needed - found.left)
    return (
        f"no budget fits: weights, activations and the smallest cache take {missing} more than there is; ask for a shorter "
        "--context, a smaller --batch or --piece, or quantise the weights (--weights SIZE)"
    )
