"""The check of a plan: slots and fidelity on samples it was not calibrated on, through the real runtime."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.evaluate.fidelity import Distance, Probe, distance, make_probe, read_through
from kvprofile.plans import make_plan
from kvprofile.profile import Achieved, Check, Fidelity, ModeCheck, Profile
from kvprofile.runtime.merger import KVMerger
from kvprofile.samples import Sample
from kvprofile.tracking import Track, untracked


def check_profile(
    model: PreTrainedModel, profile: Profile, held_out: Sequence[Sample], *, seed: int = 0, track: Track = untracked
) -> Check | None:
    """Run the plan in both modes, and the uniform plan of the same size; None without held-out samples."""
    if not held_out:
        return None
    mergers = {
        "exact": KVMerger.from_profile(profile, mode="exact"),
        "uniform": KVMerger.from_profile(_uniform(profile)),
    }
    if profile.policies[profile.statistics.policy].affinity == "cosine":
        mergers["threshold"] = KVMerger.from_profile(profile, mode="threshold")
    ratios: dict[str, list[float]] = {name: [] for name in mergers}
    distances: dict[str, list[tuple[Distance, Distance]]] = {name: [] for name in mergers}
    bytes_ratios: list[float] = []
    for index, sample in enumerate(track(held_out, "check")):
        probe = make_probe(sample.context, sample.continuation, seed=seed * 1_000_003 + index)
        stock = DynamicCache(config=model.config)
        full_bytes: list[int] = []
        reference = read_through(model, stock, probe, lambda cache: full_bytes.append(stock_bytes(cache)))  # noqa: B023
        for name, merger in mergers.items():
            rows, ratio, size = run_merged(model, merger, probe, profile.attention_layers())
            ratios[name].append(ratio)
            distances[name].append((distance(reference[0], rows[0]), distance(reference[1], rows[1])))
            if name == profile.plan.mode:
                bytes_ratios.append(size / full_bytes[0])
    results = {
        name: ModeCheck(achieved=_achieved(ratios[name], profile.plan.budget), fidelity=_fidelity(distances[name]))
        for name in mergers
    }
    return Check(
        threshold=results.get("threshold"),
        exact=results["exact"],
        uniform=results["uniform"],
        bytes_ratio=round(float(np.mean(bytes_ratios)), 6),
    )


def run_merged(
    model: PreTrainedModel, merger: KVMerger, probe: Probe, layers: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], float, int]:
    """One probe through one merger.

    Returns the log-probabilities of recall and continuation, slots over tokens of `layers` after the context, and the
    bytes allocated then.
    """
    measured: list[tuple[float, int]] = []

    def after_context(cache: Cache) -> None:
        slots = cache.slots()
        ratio = float(np.mean([slots[layer] for layer in layers])) / len(probe.context)
        measured.append((ratio, cache.nbytes()))

    merger.attach(model)
    try:
        rows = read_through(model, merger.cache(), probe, after_context)
    finally:
        merger.detach()
    return rows, *measured[0]


def stock_bytes(cache: Cache) -> int:
    """Bytes a stock cache has allocated for keys and values."""
    return sum(
        part.untyped_storage().nbytes()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
        if part is not None
    )


def _uniform(profile: Profile) -> Profile:
    plan = make_plan(
        profile.model,
        profile.policies,
        profile.statistics,
        profile.plan.budget,
        shares="uniform",
        granularity="head",
        mode="exact",
    )
    return profile.model_copy(update={"plan": plan})


def _achieved(ratios: list[float], budget: float) -> Achieved:
    return Achieved(
        mean=round(float(np.mean(ratios)), 6),
        std=round(float(np.std(ratios, ddof=1)) if len(ratios) > 1 else 0.0, 6),
        worst=round(float(max(ratios, key=lambda ratio: abs(ratio - budget))), 6),
    )


def _fidelity(distances: list[tuple[Distance, Distance]]) -> Fidelity:
    recall, continuation = zip(*distances, strict=True)
    return Fidelity(
        recall_kl=_mean([entry.kl for entry in recall]),
        recall_top1=_mean([entry.top1 for entry in recall]),
        continuation_kl=_mean([entry.kl for entry in continuation]),
        continuation_top1=_mean([entry.top1 for entry in continuation]),
    )


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 6)
