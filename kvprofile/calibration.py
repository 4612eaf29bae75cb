"""The run: a model reads samples, statistics become a plan, the plan is checked on text it has not seen."""

import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from kvprofile import __version__
from kvprofile.context_length import beyond_context, longest_text
from kvprofile.errors import UsageError
from kvprofile.evaluate.check import check_profile
from kvprofile.fingerprint import model_facts
from kvprofile.hidden_states import watching_hidden
from kvprofile.measure.damage import BUDGETS, DamageCurves
from kvprofile.measure.persistence import persistence
from kvprofile.measure.ratios import THRESHOLDS
from kvprofile.measure.statistics import Statistics
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.scores import attention_mass, mass_stride
from kvprofile.merging.sets import RULES
from kvprofile.models import LoadedModel
from kvprofile.observe import observing
from kvprofile.plans import AUTO, make_plan
from kvprofile.planting import plant
from kvprofile.probes import ProbeMix, make_probe
from kvprofile.profile import (
    Calibration,
    Created,
    DamageFacts,
    LayerStatistics,
    ModelFacts,
    PolicyFacts,
    Profile,
    TextFacts,
)
from kvprofile.profile import Statistics as StatisticsFacts
from kvprofile.resume import Checkpoint, run_facts
from kvprofile.runtime.attention import AttentionCall
from kvprofile.samples import Sample, SampleSet
from kvprofile.sensitivity import read_probe
from kvprofile.solve import check_budget
from kvprofile.tracking import Track, untracked

# The policies a head may choose between: of all in `POLICIES`, tried on samples apart, the few that add to one another.
CANDIDATES = ("value-attention", "gather-mended", "zsmerge", "attention", "snapkv-128")


def calibrate(
    loaded: LoadedModel,
    samples: SampleSet,
    *,
    budget: float = 0.5,
    policy: str = AUTO,
    rule: str | None = None,
    objective: str = "balanced",
    granularity: str = "head",
    mode: str = "exact",
    mix: ProbeMix | None = None,
    seed: int = 0,
    command: str = "",
    checkpoint: Path | None = None,
    track: Track = untracked,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2),
) -> tuple[Profile, dict[str, NDArray[np.generic]]]:
    """Measure a model, solve for a budget, check the plan; returns the profile and the big arrays.

    `policy` is one name or `auto`, which lets every head choose among `CANDIDATES`. `rule` spends the budget: by the
    measured damage unless said otherwise. `mix` says what is read from the merged cache (`ProbeMix`). `samples` are
    read one at a time; `track(items, label)` may wrap the loops to show progress. If the plan does not beat uniform
    shares on held-out text, `warn` says so and the uniform plan is returned. The profile names no arrays file yet:
    `save_profile` writes both. The statistics are kept in the file `checkpoint` after every sample; if it is there
    already, the run goes on from it. Remove it when the profile is saved.

    Raises UsageError for a bad budget or policy, or samples without a continuation, MismatchError where the budget is out
    of reach, KVProfileError where the model's attention cannot be observed or the checkpoint is of another run.
    """
    started = time.perf_counter()
    mix = mix or ProbeMix()
    check_budget(budget)
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
    base = "gauss" if policy == AUTO else policy
    candidates = candidates_for(policy, rule)
    facts = ModelFacts(
        name=loaded.name, source=loaded.source, revision=loaded.revision, **model_facts(loaded.model.config)
    )
    kept = None
    if checkpoint is not None:
        kept = Checkpoint(
            checkpoint, run_facts(loaded, samples, policy=base, candidates=candidates, mix=mix, seed=seed)
        )
    statistics = measure(
        loaded, samples.calibration, base, candidates=candidates, mix=mix, seed=seed, checkpoint=kept, track=track
    )
    arrays = statistics.finish()
    damage = None if statistics.damage is None else statistics.damage.moments.mean
    statistics_facts = _statistics_facts(statistics, base, mix)
    policies = {
        name: PolicyFacts.model_validate(POLICIES[name].to_dict()) for name in dict.fromkeys((*candidates, base))
    }
    calibration = Calibration(
        text=samples.description,
        seed=seed,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        digest=samples.digest,
        measured=_text_facts(samples.calibration),
        held_out=_text_facts(samples.held_out),
    )
    profile = Profile(
        schema_version=1,
        created=Created(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            seconds=0.0,
            kvprofile=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        ),
        model=facts,
        calibration=calibration,
        policies=policies,
        statistics=statistics_facts,
        plan=make_plan(
            facts,
            policies,
            statistics_facts,
            damage,
            budget,
            tokens=calibration.measured.tokens,
            policy=policy,
            rule=rule or ("damage" if candidates else "uniform"),
            measured=arrays,
            objective=objective,
            granularity=granularity,
            mode=mode,
        ),
        check=None,
    )
    profile = check_profile(loaded.model, profile, damage, samples.held_out, seed=seed, track=track, warn=warn)
    created = profile.created.model_copy(update={"seconds": round(time.perf_counter() - started, 1)})
    return profile.model_copy(update={"created": created}), arrays


def candidates_for(policy: str, rule: str | None) -> tuple[str, ...]:
    """The policies whose damage a calibration measures: none where nothing depends on it.

    Anchor and complete sets depend on a threshold, not on a slot count alone, so they have no damage curve over budgets.
    """
    if policy == AUTO:
        return CANDIDATES
    return (policy,) if rule in (None, "damage") and POLICIES[policy].rule not in ("anchor", "complete") else ()


def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policy: str,
    *,
    rules: tuple[str, ...] = RULES,
    candidates: Sequence[str] = (),
    mix: ProbeMix | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    track: Track = untracked,
) -> Statistics:
    """Read the samples and accumulate the statistics; memory does not grow with their number.

    Ratios are measured for `rules` with the protected tokens of `policy`, damage for the `candidates`. A `checkpoint` is
    written after every sample, and gone on from where it is there.
    """
    mix = mix or ProbeMix()
    facts = model_facts(loaded.model.config)
    merged = [index for index, kind in enumerate(facts["attention"]) if kind == "full_attention"]
    tokens = max(len(sample.context) for sample in samples)
    curves = (
        DamageCurves(len(merged), facts["kv_heads"], [(name, POLICIES[name]) for name in candidates], mix.kinds)
        if candidates
        else None
    )
    statistics = Statistics(facts["layers"], facts["kv_heads"], tokens, POLICIES[policy], rules=rules, damage=curves)
    done = 0 if checkpoint is None else checkpoint.load(statistics)
    for index, sample in enumerate(track(samples[done:], "measure"), start=done):
        _read(loaded, sample, statistics, merged, mix, seed=seed * 1_000_003 + index)
        if checkpoint is not None:
            checkpoint.save(statistics, index + 1)
    return statistics


def _read(
    loaded: LoadedModel, sample: Sample, statistics: Statistics, merged: list[int], mix: ProbeMix, *, seed: int
) -> None:
    def on_context(layer: int, call: AttentionCall, mass: Tensor | None) -> None:
        statistics.update(layer, sample.kind, call, mass)

    def on_plain_context(layer: int, call: AttentionCall, _output: Tensor) -> None:
        mass = None
        if layer in merged and statistics.ratios.rules:
            mass = attention_mass(
                call.query,
                call.key,
                call.scaling,
                stride=mass_stride(call.query.shape[2]),
                softcap=call.softcap,
                sinks=call.sinks,
            )
        on_context(layer, call, mass)

    with observing(loaded.model) as observer, watching_hidden(loaded.model, statistics.change.update):
        curves = statistics.damage
        if curves is None:
            observer.read(sample.context, on_plain_context)
            return
        context, questions = plant(sample.context, loaded.tokenizer, facts=mix.facts, lookups=mix.lookups, seed=seed)
        read_probe(
            observer,
            make_probe(context, sample.continuation, seed, mix=mix, questions=questions),
            on_context,
            lambda layer, reading: curves.update(merged.index(layer), reading),
            layers=merged,
            seed=seed,
        )


def _statistics_facts(statistics: Statistics, policy: str, mix: ProbeMix) -> StatisticsFacts:
    """The part of the statistics that goes into the JSON: the ratios under the policy's own rule, and persistence."""
    own = POLICIES[policy].rule
    rule = own if own in ("anchor", "complete") else "chain"
    index = statistics.ratios.rules.index(rule)
    overall = statistics.ratios.overall()
    mean, std = overall.mean[:, index, :-1].round(4), overall.std()[:, index, :-1].round(4)
    return StatisticsFacts(
        rule=rule,  # type: ignore[arg-type]
        policy=policy,
        thresholds=THRESHOLDS.tolist(),
        layers=[
            LayerStatistics(layer=layer, ratio=mean[layer].tolist(), ratio_std=std[layer].tolist())
            for layer in range(len(mean))
        ],
        persistence=persistence(statistics.ratios, rule),
        damage=None
        if statistics.damage is None
        else DamageFacts(
            policies=[name for name, _ in statistics.damage.policies],
            budgets=list(BUDGETS),
            kinds=list(mix.kinds),
            **asdict(mix),
        ),
        arrays=None,
    )


def _text_facts(samples: Sequence[Sample]) -> TextFacts:
    return TextFacts(
        samples=len(samples),
        tokens=max((len(sample.context) for sample in samples), default=0),
        kinds=dict(sorted(Counter(sample.kind for sample in samples).items())),
    )
