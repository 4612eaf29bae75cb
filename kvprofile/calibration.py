"""The run: a model reads samples, statistics become a plan, the plan is checked on text it has not seen."""

import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kvprofile import __version__
from kvprofile.errors import UsageError
from kvprofile.evaluate.check import check_profile
from kvprofile.fingerprint import model_facts
from kvprofile.measure.damage import BUDGETS, DamageCurves
from kvprofile.measure.persistence import persistence
from kvprofile.measure.ratios import THRESHOLDS
from kvprofile.measure.statistics import Statistics
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.sets import RULES
from kvprofile.models import LoadedModel
from kvprofile.observe import observing
from kvprofile.plans import AUTO, make_plan
from kvprofile.probes import CONTINUATION_TOKENS, KINDS, PASSAGE_TOKENS, PASSAGES, make_probe
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
from kvprofile.runtime.attention import AttentionCall
from kvprofile.samples import Sample, SampleSet
from kvprofile.sensitivity import read_probe
from kvprofile.solve import check_budget
from kvprofile.tracking import Track, untracked

# The policies a head may choose between: of those tried on separate halves of the samples, the few that add to one another.
CANDIDATES = ("value-attention", "absorb", "attention", "snapkv-128", "streaming")


def calibrate(
    loaded: LoadedModel,
    samples: SampleSet,
    *,
    budget: float = 0.5,
    policy: str = AUTO,
    shares: str | None = None,
    objective: str = "balanced",
    granularity: str = "head",
    mode: str = "exact",
    seed: int = 0,
    command: str = "",
    track: Track = untracked,
    warn: Callable[[str], None] = lambda message: warnings.warn(message, stacklevel=2),
) -> tuple[Profile, dict[str, NDArray[np.generic]]]:
    """Measure a model, solve for a budget, check the plan; returns the profile and the big arrays.

    `policy` is one name or `auto`, which lets every head choose among `CANDIDATES`. `shares` follow the measured damage
    unless said otherwise. `samples` are read one at a time; `track(items, label)` may wrap the loops to show progress. If
    the plan does not beat uniform shares on held-out text, `warn` says so and the uniform plan is returned. The profile
    names no arrays file yet: `save_profile` writes both.

    Raises UsageError for a bad budget or policy, or samples without a continuation, MismatchError where the budget is out
    of reach, KVProfileError where the model's attention cannot be observed.
    """
    started = time.perf_counter()
    check_budget(budget)
    if policy not in (AUTO, *POLICIES):
        raise UsageError(f"unknown policy {policy!r}; expected auto or one of {', '.join(POLICIES)}")
    if any(not len(sample.continuation) for sample in (*samples.calibration, *samples.held_out)):
        raise UsageError(
            "a sample has no continuation, the text that follows its context and is read from the merged cache; make the "
            "samples with continuation=256"
        )
    base = "gauss" if policy == AUTO else policy
    candidates: tuple[str, ...] = CANDIDATES if policy == AUTO else (policy,)
    # Damage is measured where something depends on it. Anchor and complete sets depend on a threshold, not on a slot count
    # alone, so they have no damage curve over budgets.
    if policy != AUTO and (shares not in (None, "damage") or POLICIES[policy].rule not in ("chain", "drop")):
        candidates = ()
    facts = ModelFacts(
        name=loaded.name, source=loaded.source, revision=loaded.revision, **model_facts(loaded.model.config)
    )
    statistics = measure(loaded, samples.calibration, base, candidates=candidates, seed=seed, track=track)
    arrays = statistics.finish()
    damage = None if statistics.damage is None else statistics.damage.moments.mean
    statistics_facts = _statistics_facts(statistics, base)
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
            shares=shares or ("damage" if candidates else "uniform"),
            objective=objective,
            granularity=granularity,
            mode=mode,
        ),
        check=None,
    )
    profile = check_profile(loaded.model, profile, damage, samples.held_out, seed=seed, track=track, warn=warn)
    created = profile.created.model_copy(update={"seconds": round(time.perf_counter() - started, 1)})
    return profile.model_copy(update={"created": created}), arrays


def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policy: str,
    *,
    rules: tuple[str, ...] = RULES,
    candidates: Sequence[str] = (),
    seed: int = 0,
    track: Track = untracked,
) -> Statistics:
    """Read the samples and accumulate the statistics; memory does not grow with their number.

    Ratios are measured for `rules` with the protected tokens of `policy`, damage for the `candidates`.
    """
    facts = model_facts(loaded.model.config)
    merged = [index for index, kind in enumerate(facts["attention"]) if kind == "full_attention"]
    tokens = max(len(sample.context) for sample in samples)
    curves = (
        DamageCurves(len(merged), facts["kv_heads"], [(name, POLICIES[name]) for name in candidates])
        if candidates
        else None
    )
    statistics = Statistics(facts["layers"], facts["kv_heads"], tokens, POLICIES[policy], rules=rules, damage=curves)
    for index, sample in enumerate(track(samples, "measure")):
        _read(loaded, sample, statistics, merged, seed=seed * 1_000_003 + index)
    return statistics


def _read(loaded: LoadedModel, sample: Sample, statistics: Statistics, merged: list[int], *, seed: int) -> None:
    def on_context(layer: int, call: AttentionCall) -> None:
        statistics.update(layer, sample.kind, call)

    with observing(loaded.model) as observer:
        curves = statistics.damage
        if curves is None:
            observer.read(sample.context, lambda layer, call, _output: on_context(layer, call))
            return
        read_probe(
            observer,
            make_probe(sample.context, sample.continuation, seed),
            on_context,
            lambda layer, reading: curves.update(merged.index(layer), reading),
            layers=merged,
            seed=seed,
        )


def _statistics_facts(statistics: Statistics, policy: str) -> StatisticsFacts:
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
            kinds=list(KINDS),
            passages=PASSAGES,
            passage_tokens=PASSAGE_TOKENS,
            continuation_tokens=CONTINUATION_TOKENS,
        ),
        arrays=None,
    )


def _text_facts(samples: Sequence[Sample]) -> TextFacts:
    return TextFacts(
        samples=len(samples),
        tokens=max((len(sample.context) for sample in samples), default=0),
        kinds=dict(sorted(Counter(sample.kind for sample in samples).items())),
    )
