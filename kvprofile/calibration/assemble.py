"""From a run's statistics to a profile that is not checked yet: the model is not needed."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kvprofile import __version__
from kvprofile.calibration.measure.codec_damage import SHARES
from kvprofile.calibration.measure.damage import BUDGETS
from kvprofile.calibration.measure.persistence import persistence
from kvprofile.calibration.measure.ratios import THRESHOLDS
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.runs import Run
from kvprofile.merging.policies import POLICIES
from kvprofile.names import NO_CODEC
from kvprofile.planning.plans import make_plan
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import SCHEMA_VERSION, Created, DamageFacts, LayerStatistics, ModelFacts, Statistics


def make_profile(
    run: Run,
    statistics: Measurements,
    budget: float | None = None,
    *,
    bytes: float | None = None,
    rule: str | None = None,
    objective: str = "balanced",
    granularity: str = "head",
    mode: str = "exact",
    command: str = "",
) -> tuple[Profile, dict[str, NDArray[np.generic]]]:
    """Solve for a budget, or for bytes; returns the profile and the big arrays.

    The profile has no check and names no arrays file yet.

    `rule` spends the budget: by the measured damage unless said otherwise. `command` is what the profile records as its
    origin. Raises UsageError for a bad budget or choice, MismatchError where the budget is out of reach.
    """
    arrays = statistics.finish()
    facts = _statistics_facts(statistics, run.base, run.mix, run.model)
    plan = make_plan(
        run.model,
        run.policies,
        facts,
        None if statistics.damage is None else statistics.damage.moments.mean,
        budget,
        bytes=bytes,
        tokens=run.calibration.measured.tokens,
        policy=run.policy,
        rule=rule or ("damage" if run.candidates else "uniform"),
        measured=arrays,
        codec=None if run.codecs else NO_CODEC,
        objective=objective,
        granularity=granularity,
        mode=mode,
    )
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        created=Created(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            seconds=0.0,
            kvprofile=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        ),
        model=run.model,
        calibration=run.calibration,
        policies=run.policies,
        statistics=facts,
        plan=plan,
        check=None,
    )
    return profile, arrays


def _statistics_facts(statistics: Measurements, policy: str, mix: ProbeMix, model: ModelFacts) -> Statistics:
    """The part of the statistics that goes into the JSON: the ratios under the policy's own rule, and persistence."""
    own = POLICIES[policy].rule
    rule = own if own in ("anchor", "complete") else "chain"
    index = statistics.ratios.rules.index(rule)
    overall = statistics.ratios.overall()
    mean, std = overall.mean[:, index, :-1].round(4), overall.std()[:, index, :-1].round(3)
    return Statistics(
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
            **_codec_facts(statistics),
            windows=model.windowed_layers() if statistics.windows is not None else [],
        ),
        arrays=None,
    )


def _codec_facts(statistics: Measurements) -> dict[str, Any]:
    if statistics.codecs is None:
        return {}
    policies = [name for name, _ in statistics.codecs.policies]
    return {"codecs": list(statistics.codecs.codecs), "codec_policies": policies, "codec_shares": list(SHARES)}
