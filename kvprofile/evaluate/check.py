"""The check of a plan: slots and fidelity on samples it was not calibrated on, through the real runtime."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.calibration.hidden_states import count_layers, counting_layers
from kvprofile.calibration.tracking import Parts, Track, untracked
from kvprofile.calibration.workers import ALONE, Workers
from kvprofile.evaluate.fidelity import Distance, Trial, distance, make_trial, read_through
from kvprofile.evaluate.intervals import bootstrap
from kvprofile.models.device_memory import explaining_memory
from kvprofile.planning.plans import replan
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import Achieved, Check, Fidelity, ModeCheck
from kvprofile.runtime.cache import held_bytes
from kvprofile.runtime.merger import KVMerger
from kvprofile.samples import Sample

FIGURES = 6  # of one sample through one merger
READS = 3  # forwards of one sample through one cache: its context, recall, continuation


def check_profile(
    model: PreTrainedModel,
    profile: Profile,
    damage: NDArray[np.floating] | None,
    held_out: Sequence[Sample],
    *,
    arrays: Mapping[str, NDArray[np.generic]] | None = None,
    seed: int = 0,
    workers: Workers = ALONE,
    track: Track = untracked,
    warn: Callable[[str], None],
) -> Profile:
    """The profile with its check: the plan and the uniform plan of the same size on held-out samples.

    The uniform plan of a plan for bytes has the same policy, share and codecs in every head, for the same bytes; the `arrays`
    say which is the best of these.

    If the plan does not beat uniform shares there, `warn` is told and the uniform plan takes its place. Without held-out
    samples the profile is returned as it is. Several `workers` read a share of the samples each and get the same profile.
    """
    if not held_out:
        return profile
    uniform = replan(profile, damage, measured=arrays, rule="uniform", granularity="head", mode="exact")
    plans = {"exact": profile, "uniform": uniform}
    if all(head.epsilon is not None or head.share >= 1 for layer in profile.plan.layers for head in layer.heads):
        plans["threshold"] = profile
    mergers = {
        name: KVMerger.from_profile(plan, mode="threshold" if name == "threshold" else "exact", arrays=arrays)
        for name, plan in plans.items()
    }
    if _same(profile, uniform):
        del mergers["uniform"]
    # Each of the `workers` reads its share; every other number is zero, so that their sum is all of them.
    found = np.zeros((len(mergers), len(held_out), FIGURES))
    for index in track(workers.share(range(len(held_out))), "check"):
        trial = make_trial(held_out[index].context, held_out[index].continuation, seed=seed * 1_000_003 + index)
        parts = Parts(track, count_layers(model) * READS * (1 + len(mergers)))
        doing = f"checking the plan on {len(trial.context):,} tokens"
        with explaining_memory(model, doing, "lower --tokens (fewer --held-out do not help)"):
            found[:, index] = _measure(model, list(mergers.values()), trial, profile.attention_layers(), parts.tick)
    results = {
        name: [_Result.of(row) for row in rows] for name, rows in zip(mergers, workers.total(found), strict=True)
    }
    modes = {name: _mode_check(rows, profile.plan.budget) for name, rows in results.items()}
    check = Check(
        threshold=modes.get("threshold"),
        exact=modes["exact"],
        uniform=modes.get("uniform", modes["exact"]),
        uniform_policy=uniform.plan.layers[0].heads[0].policy,
        bytes_ratio=_mean([row.bytes_ratio for row in results[profile.plan.mode]]),
    )
    planned, even = _total(check.exact), _total(check.uniform)
    if planned > even:
        warn(
            f"the plan's KL on held-out text, {planned:.4f}, is not below that of uniform shares, {even:.4f}: the uniform "
            "plan is exported; calibrate with more samples, or text nearer to what the model will read"
        )
        even_bytes = _mean([row.bytes_ratio for row in results["uniform"]])
        check = check.model_copy(update={"exact": check.uniform, "threshold": None, "bytes_ratio": even_bytes})
        profile = uniform
    return profile.model_copy(update={"check": check})


@dataclass(frozen=True)
class _Result:
    """One held-out sample through one merger."""

    ratio: float
    bytes_ratio: float
    recall: Distance
    continuation: Distance

    @classmethod
    def of(cls, row: NDArray[np.float64]) -> "_Result":
        """From its `FIGURES` numbers, in the order of `_measure`."""
        ratio, size, *figures = row.tolist()
        return cls(ratio, size, Distance(*figures[:2]), Distance(*figures[2:]))


def _measure(
    model: PreTrainedModel,
    mergers: Sequence[KVMerger],
    trial: Trial,
    layers: Sequence[int],
    tick: Callable[[], None],
) -> NDArray[np.float64]:
    """One held-out sample through every merger: slots, bytes, then KL and top-1 of recall and continuation."""
    full: list[int] = []
    stock = DynamicCache(config=model.config)
    with counting_layers(model, tick):
        reference = read_through(model, stock, trial, lambda cache: full.append(held_bytes(cache)))
    rows = []
    for merger in mergers:
        read, ratio, size = run_merged(model, merger, trial, layers, tick)
        recall, continuation = (distance(*pair) for pair in zip(reference, read, strict=True))
        rows.append([ratio, size / full[0], recall.kl, recall.top1, continuation.kl, continuation.top1])
    return np.array(rows)


def run_merged(
    model: PreTrainedModel,
    merger: KVMerger,
    trial: Trial,
    layers: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> tuple[tuple[Tensor, Tensor], float, int]:
    """One trial through one merger.

    Returns the log-probabilities of recall and continuation, slots over tokens of `layers` after the context, and the
    bytes allocated then; `tick` hears of every layer of every forward.
    """
    measured: list[tuple[float, int]] = []

    def after_context(cache: Cache) -> None:
        slots = cache.slots()
        ratio = float(np.mean([slots[layer] for layer in layers])) / len(trial.context)
        measured.append((ratio, cache.nbytes()))

    merger.attach(model)
    try:
        with counting_layers(model, tick):
            rows = read_through(model, merger.cache(), trial, after_context)
    finally:
        merger.detach()
    return rows, *measured[0]


def _same(profile: Profile, uniform: Profile) -> bool:
    return [layer.heads for layer in profile.plan.layers] == [layer.heads for layer in uniform.plan.layers]


def _total(mode: ModeCheck) -> float:
    return mode.fidelity.recall_kl + mode.fidelity.continuation_kl


def _mode_check(results: list[_Result], budget: float) -> ModeCheck:
    ratios = [result.ratio for result in results]
    recall, continuation = ([getattr(result, kind) for result in results] for kind in ("recall", "continuation"))
    return ModeCheck(
        achieved=Achieved(
            mean=_mean(ratios),
            std=round(float(np.std(ratios, ddof=1)) if len(ratios) > 1 else 0.0, 6),
            worst=round(float(max(ratios, key=lambda ratio: abs(ratio - budget))), 6),
        ),
        fidelity=Fidelity(
            recall_kl=_mean([entry.kl for entry in recall]),
            recall_kl_interval=bootstrap([entry.kl for entry in recall]),
            recall_top1=_mean([entry.top1 for entry in recall]),
            continuation_kl=_mean([entry.kl for entry in continuation]),
            continuation_kl_interval=bootstrap([entry.kl for entry in continuation]),
            continuation_top1=_mean([entry.top1 for entry in continuation]),
        ),
    )


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 6)
