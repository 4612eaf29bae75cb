"""The run: a model reads samples, statistics become a plan, the plan is checked on text it has not seen."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvprofile.calibration.assemble import make_profile
from kvprofile.calibration.gradient_flow import check_gradients
from kvprofile.calibration.measuring import measure, measure_into
from kvprofile.calibration.partials import Partial, join
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.runs import Run, run_of
from kvprofile.calibration.tracking import Track, untracked
from kvprofile.calibration.workers import ALONE, Workers
from kvprofile.codecs.table import CODECS
from kvprofile.errors import UsageError
from kvprofile.evaluate.check import check_profile
from kvprofile.merging.policies import POLICIES
from kvprofile.models.context_length import beyond_context, longest_text
from kvprofile.models.load import LoadedModel
from kvprofile.names import AUTO, NO_CODEC
from kvprofile.planning.reach import asked_for
from kvprofile.profile.profile import Profile
from kvprofile.samples import SampleSet

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
