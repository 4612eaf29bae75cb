"""Measuring: a model reads samples one at a time, and what is seen is accumulated, in memory or a file for each sample."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from kvprofile.calibration.hidden_states import count_layers, counting_layers, watching_hidden
from kvprofile.calibration.measure.damage import Reading
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.measure.window_damage import WindowReading
from kvprofile.calibration.observe import observing
from kvprofile.calibration.partials import Partial
from kvprofile.calibration.planting import plant
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.probes import make_probe
from kvprofile.calibration.runs import empty_statistics, facts_of
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.calibration.tracking import Parts, Track, untracked
from kvprofile.calibration.workers import ALONE, Workers
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.scores import estimated_mass
from kvprofile.merging.sets import SET_RULES
from kvprofile.models.device_memory import explaining_memory
from kvprofile.models.load import LoadedModel
from kvprofile.runtime.attention import AttentionCall
from kvprofile.samples import Sample


def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policy: str,
    *,
    rules: tuple[str, ...] = SET_RULES,
    candidates: Sequence[str] = (),
    codecs: Sequence[str] = (),
    mix: ProbeMix | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Measurements:
    """Read the samples and accumulate the statistics; memory does not grow with their number.

    Ratios are measured for `rules` with the protected tokens of `policy`, damage for the `candidates` and the `codecs`.
    """
    mix = mix or ProbeMix()
    tokens = max(len(sample.context) for sample in samples)
    curves = [(name, POLICIES[name]) for name in candidates]
    statistics = empty_statistics(facts_of(loaded), tokens, POLICIES[policy], curves, mix, rules=rules, codecs=codecs)
    for index, sample in enumerate(track(samples, "measure")):
        with _explaining(loaded, sample):
            _read(loaded, sample, statistics, mix, seed=_seed(seed, index), track=track)
    return statistics


def measure_into(
    partial: Partial,
    loaded: LoadedModel,
    samples: Sequence[Sample],
    wanted: Sequence[int],
    *,
    workers: Workers = ALONE,
    track: Track = untracked,
) -> None:
    """Measure the `wanted` samples that `partial` does not hold yet, each into a file of its own.

    With several `workers` each measures its share, and all return when all are done.
    """
    run = partial.run
    # The first process looks for all: files appear while the others would.
    done = partial.done() if workers.rank == 0 else set(wanted)
    missing = np.array([float(index not in done) for index in wanted])
    todo = [index for index, lacks in zip(wanted, workers.total(missing), strict=True) if lacks]
    for index in track(workers.share(todo), "measure"):
        statistics = run.statistics()
        with _explaining(
            loaded, samples[index], "; finished samples are kept, and --resume with the same flags goes on"
        ):
            _read(loaded, samples[index], statistics, run.mix, seed=_seed(run.calibration.seed, index), track=track)
        partial.save(index, statistics)
    workers.meet()


def _explaining(loaded: LoadedModel, sample: Sample, kept: str = "") -> AbstractContextManager[None]:
    doing = f"measuring a sample of {len(sample.context):,} tokens"
    return explaining_memory(loaded.model, doing, "lower --tokens (fewer --samples do not help)", kept)


def _seed(seed: int, index: int) -> int:
    """The seed of one sample's draws: it follows from its index, whoever reads it."""
    return seed * 1_000_003 + index


def _read(
    loaded: LoadedModel, sample: Sample, statistics: Measurements, mix: ProbeMix, *, seed: int, track: Track
) -> None:
    model, curves = loaded.model, statistics.damage
    facts = facts_of(loaded)
    merged = facts.full_attention_layers()
    windows = {} if statistics.windows is None else dict.fromkeys(facts.windowed_layers(), facts.window or 0)
    parts = Parts(track, count_layers(model) if curves is None else 2 * count_layers(model) + len(merged))

    def on_context(layer: int, call: AttentionCall, mass: Tensor | None) -> None:
        statistics.update(layer, sample.kind, call, mass)

    def on_plain_context(layer: int, call: AttentionCall, _output: Tensor) -> None:
        mass = None
        if layer in merged and statistics.ratios.rules:
            mass = estimated_mass(call.query, call.key, call.softmax)
        on_context(layer, call, mass)

    def on_probe(layer: int, reading: Reading) -> None:
        assert curves is not None  # the probe is read for them
        curves.update(merged.index(layer), reading)
        if statistics.codecs is not None:
            statistics.codecs.update(merged.index(layer), reading)
        parts.tick()

    def on_window(layer: int, reading: WindowReading) -> None:
        assert statistics.windows is not None  # it was asked for
        statistics.windows.update(list(windows).index(layer), reading)

    with (
        observing(model) as observer,
        watching_hidden(model, statistics.change.update),
        counting_layers(model, parts.tick),
    ):
        if curves is None:
            observer.read(sample.context, on_plain_context)
            return
        context, questions = plant(sample.context, loaded.tokenizer, facts=mix.facts, lookups=mix.lookups, seed=seed)
        probe = make_probe(context, sample.continuation, seed, mix=mix, questions=questions)
        read_probe(
            observer,
            probe,
            on_context,
            on_probe,
            layers=merged,
            seed=seed,
            windows=windows,
            watch_window=on_window,
        )
