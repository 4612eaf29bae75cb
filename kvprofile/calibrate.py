"""The run: a model reads samples, statistics become a plan, the plan is checked on text it has not seen."""

import platform
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kvprofile import __version__
from kvprofile.errors import UsageError
from kvprofile.evaluate.check import check_profile
from kvprofile.fingerprint import model_facts
from kvprofile.measure.persistence import persistence
from kvprofile.measure.ratios import THRESHOLDS
from kvprofile.measure.statistics import Statistics
from kvprofile.merging.policies import POLICIES
from kvprofile.models import LoadedModel
from kvprofile.observe import observe
from kvprofile.plans import make_plan
from kvprofile.profile import (
    Calibration,
    Created,
    LayerStatistics,
    ModelFacts,
    PolicyFacts,
    Profile,
    TextFacts,
)
from kvprofile.profile import Statistics as StatisticsFacts
from kvprofile.samples import Sample, SampleSet
from kvprofile.tracking import Track, untracked


def calibrate(
    loaded: LoadedModel,
    samples: SampleSet,
    *,
    budget: float = 0.5,
    policy: str = "gauss",
    shares: str = "uniform",
    granularity: str = "head",
    mode: str = "threshold",
    seed: int = 0,
    command: str = "",
    track: Track = untracked,
) -> tuple[Profile, dict[str, NDArray[np.generic]]]:
    """Measure a model, solve for a budget, check the plan; returns the profile and the big arrays.

    `samples` are read one at a time; `track(items, label)` may wrap the loops to show progress. The profile names no
    arrays file yet: `save_profile` writes both.

    Raises UsageError for a bad budget or policy, MismatchError where the budget is out of reach, KVProfileError where the
    model's attention cannot be observed.
    """
    started = time.perf_counter()
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}; expected one of {', '.join(POLICIES)}")
    facts = ModelFacts(
        name=loaded.name, source=loaded.source, revision=loaded.revision, **model_facts(loaded.model.config)
    )
    statistics = measure(loaded, samples.calibration, policy, track)
    statistics_facts = _statistics_facts(statistics, policy)
    policies = {policy: PolicyFacts.model_validate(POLICIES[policy].to_dict())}
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
        calibration=Calibration(
            text=samples.description,
            seed=seed,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            device=loaded.model.device.type,
            digest=samples.digest,
            measured=_text_facts(samples.calibration),
            held_out=_text_facts(samples.held_out),
        ),
        policies=policies,
        statistics=statistics_facts,
        plan=make_plan(facts, policies, statistics_facts, budget, shares=shares, granularity=granularity, mode=mode),
        check=None,
    )
    check = check_profile(loaded.model, profile, samples.held_out, seed=seed, track=track)
    seconds = round(time.perf_counter() - started, 1)
    profile = profile.model_copy(
        update={"check": check, "created": profile.created.model_copy(update={"seconds": seconds})}
    )
    return profile, statistics.finish()


def measure(loaded: LoadedModel, samples: Sequence[Sample], policy: str, track: Track = untracked) -> Statistics:
    """Read the samples and accumulate the statistics; memory does not grow with their number."""
    facts = model_facts(loaded.model.config)
    tokens = max(len(sample.context) for sample in samples)
    statistics = Statistics(facts["layers"], facts["kv_heads"], tokens, POLICIES[policy])
    for sample in track(samples, "measure"):
        observe(
            loaded.model,
            sample.context[None],
            lambda layer, call, kind=sample.kind: statistics.update(layer, kind, call),  # type: ignore[misc]
        )
    return statistics


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
        arrays=None,
    )


def _text_facts(samples: Sequence[Sample]) -> TextFacts:
    return TextFacts(
        samples=len(samples),
        tokens=max((len(sample.context) for sample in samples), default=0),
        kinds=dict(sorted(Counter(sample.kind for sample in samples).items())),
    )
