"""The run: a model reads samples, statistics become a plan, the plan is checked on text it has not seen."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.assemble import make_profile
from kvprofile.calibration.gradient_flow import check_gradients
from kvprofile.calibration.hidden_states import count_layers, counting_layers, watching_hidden
from kvprofile.calibration.measure.damage import Reading
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.observe import observing
from kvprofile.calibration.partials import Partial, join
from kvprofile.calibration.planting import plant
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.probes import make_probe
from kvprofile.calibration.runs import Run, empty_statistics, facts_of, run_of
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.calibration.tracking import Parts, Track, untracked
from kvprofile.calibration.workers import ALONE, Workers
from kvprofile.codecs.table import CODECS
from kvprofile.errors import UsageError
from kvprofile.evaluate.check import check_profile
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.scores import estimated_mass
from kvprofile.merging.sets import SET_RULES
from kvprofile.models.context_length import beyond_context, longest_text
from kvprofile.models.device_memory import explaining_memory
from kvprofile.models.load import LoadedModel
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.reach import asked_for
from kvprofile.profile.schema import Profile
from kvprofile.runtime.attention import AttentionCall
from kvprofile.samples import Sample, SampleSet

# What `auto` measures: 16 bits cost as much as none, and fp8 does more harm than int8 at its size.
MEASURED_CODECS = ("int8", "int6", "int4", "int3", "int2")
# The policies a head may choose between: of all in `POLICIES`, tried on samples apart, the few that add to one another.
CANDIDATES = ("value-attention", "gather-mended", "zsmerge", "attention", "snapkv-128")


def calibrate(
    loaded: LoadedModel,
    samples: SampleSet,
    *,
    budget: float | None = None,
    bytes: float | None = None,
    policy: str = AUTO,
    codec: str = AUTO,
    rule: str | None = None,
    objective: str = "balanced",
    granularity: str = "head",
    mode: str = "exact",
    mix: ProbeMix | None = None,
    seed: int = 0,
    command: str = "",
    checkpoint: Path | None = None,
    workers: Workers = ALONE,
    track: Track = untracked,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2),
) -> tuple[Profile, dict[str, NDArray[np.generic]]]:
    """Measure a model, solve for a budget, check the plan; returns the profile and the big arrays.

    `budget` is the fraction of the slots to keep, half of them unless said otherwise; `bytes`, in its place, that of the bytes,
    which are spent on slots and on bits. `codec` says which codecs are measured for that, now or later (`codecs_for`).
    `policy` is one name or `auto`, which lets every head choose among `CANDIDATES`. `rule` spends the budget: by the measured
    damage unless said otherwise. `mix` says what is read from the merged cache (`ProbeMix`). `samples` are read one at a time;
    `track` may wrap the loops to show progress. If the plan does not beat uniform shares on held-out text, `warn` says so and
    the uniform plan is returned. The profile names no arrays file yet: `save_profile` writes both. Every sample's statistics
    are kept in the folder `checkpoint`; what is there already is not measured again. Remove it when the profile is saved. With
    `workers` every process calls this with the same arguments, measures its share, and gets the same profile.

    Raises UsageError for a bad budget or policy, or samples without a continuation, MismatchError where the budget is out
    of reach, KVProfileError where the model's attention cannot be observed, no gradient passes through its weights, memory
    runs out, the checkpoint is of another run, or another process has ended.
    """
    started = time.perf_counter()
    asked_for(budget, bytes)  # what cannot be asked for is told before the work
    mix = mix or ProbeMix()
    run = _run_of(loaded, samples, policy, rule, codec=codec, mix=mix, seed=seed, warn=warn)
    if checkpoint is not None:
        wanted = range(run.samples)
        measure_into(Partial(checkpoint, run), loaded, samples.calibration, wanted, workers=workers, track=track)
        _, statistics = join([checkpoint])
        workers.meet()  # all have read the samples: whoever writes the profile may remove them
    elif workers.size > 1:
        raise UsageError(
            "several processes join what they measured through files; give checkpoint, a folder all can reach"
        )
    else:
        statistics = measure(
            loaded,
            samples.calibration,
            run.base,
            candidates=run.candidates,
            codecs=run.codecs,
            mix=mix,
            seed=seed,
            track=track,
        )
    profile, arrays = make_profile(
        run,
        statistics,
        budget,
        bytes=bytes,
        rule=rule,
        objective=objective,
        granularity=granularity,
        mode=mode,
        command=command,
    )
    damage = None if statistics.damage is None else statistics.damage.moments.mean
    profile = check_profile(
        loaded.model,
        profile,
        damage,
        samples.held_out,
        arrays=arrays,
        seed=seed,
        workers=workers,
        track=track,
        warn=warn,
    )
    created = profile.created.model_copy(update={"seconds": round(time.perf_counter() - started, 1)})
    return profile.model_copy(update={"created": created}), arrays


def calibrate_shard(
    loaded: LoadedModel,
    samples: SampleSet,
    shard: tuple[int, int],
    *,
    policy: str = AUTO,
    codec: str = AUTO,
    rule: str | None = None,
    mix: ProbeMix | None = None,
    seed: int = 0,
    checkpoint: Path,
    workers: Workers = ALONE,
    track: Track = untracked,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2),
) -> list[int]:
    """Measure shard (2, 8), the second eighth of the samples, into the folder `checkpoint`; returns their indices.

    `partials.join` makes statistics of all shards, `assemble.make_profile` a profile of these.
    Raises UsageError for more shards than samples, otherwise as `calibrate` does.
    """
    number, shards = shard
    run = _run_of(loaded, samples, policy, rule, codec=codec, mix=mix or ProbeMix(), seed=seed, warn=warn)
    if shards > run.samples:
        raise UsageError(
            f"{shards} shards of {run.samples} samples leave some empty; ask for more --samples or fewer shards"
        )
    wanted = range(number - 1, run.samples, shards)
    partial = Partial(checkpoint, run, shards)
    measure_into(partial, loaded, samples.calibration, wanted, workers=workers, track=track)
    return list(wanted)


def candidates_for(policy: str, rule: str | None) -> tuple[str, ...]:
    """The policies whose damage a calibration measures: none where nothing depends on it.

    Anchor and complete sets depend on a threshold, not on a slot count alone, so they have no damage curve over budgets.
    """
    if policy == AUTO:
        return CANDIDATES
    return (policy,) if rule in (None, "damage") and POLICIES[policy].rule not in ("anchor", "complete") else ()


def codecs_for(codec: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The codecs whose damage a calibration measures: `none`, `auto` for the usual ones, or names separated by commas.

    None where no policy's damage is measured. Raises UsageError for a name that is no codec.
    """
    names = MEASURED_CODECS if codec == AUTO else tuple(dict.fromkeys(codec.split(",")))
    names = () if names == (NO_CODEC,) else names
    for name in names:
        if name not in CODECS or name == NO_CODEC:
            raise UsageError(
                f"unknown codec {name!r}; expected auto, none, or names separated by commas of "
                f"{', '.join(known for known in CODECS if known != NO_CODEC)}"
            )
    return names if candidates else ()


def _run_of(
    loaded: LoadedModel,
    samples: SampleSet,
    policy: str,
    rule: str | None,
    *,
    codec: str,
    mix: ProbeMix,
    seed: int,
    warn: Callable[[str], None],
) -> Run:
    """What is to be measured; what cannot be is refused, and what is odd is told."""
    if policy not in (AUTO, *POLICIES):
        raise UsageError(f"unknown policy {policy!r}; expected auto or one of {', '.join(POLICIES)}")
    if any(not len(sample.continuation) for sample in (*samples.calibration, *samples.held_out)):
        raise UsageError(
            "a sample has no continuation, the text that follows its context and is read from the merged cache; make the "
            "samples with continuation=256"
        )
    read = max(
        (len(sample.context) + max(len(sample.continuation), mix.tokens) for sample in samples.calibration), default=0
    )
    if message := beyond_context(longest_text(loaded.model.config), read, "samples and what is read after them take"):
        warn(message)
    base, candidates = "gauss" if policy == AUTO else policy, candidates_for(policy, rule)
    if candidates:
        check_gradients(loaded.model)
    codecs = codecs_for(codec, candidates)
    return run_of(loaded, samples, policy=policy, base=base, candidates=candidates, codecs=codecs, mix=mix, seed=seed)


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
    merged = facts_of(loaded).full_attention_layers()
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
        read_probe(observer, probe, on_context, on_probe, layers=merged, seed=seed)
