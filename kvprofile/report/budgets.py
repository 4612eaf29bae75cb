"""What other budgets would cost: the profile's curves, solved again for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import MismatchError, UsageError
from kvprofile.files import lies_at
from kvprofile.planning.plans import solver_of
from kvprofile.planning.solver import total
from kvprofile.profile.places import locate
from kvprofile.profile.profile import Profile
from kvprofile.profile.storage import load_arrays

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """One budget: predicted damage of the plan, and of uniform shares, in nats per token; bytes of the planned layers."""

    budget: float
    damage: float | None
    uniform: float | None
    nbytes: int | None


def costs(profile: Profile, arrays: Mapping[str, NDArray[np.generic]] | None) -> list[Cost]:
    """The budgets of `GRID` and the profile's own, in rising order; those out of the plan's reach are left out.

    Nothing where no arrays are at hand or no damage was measured.

    All with the plan's own settings. The profile's own row is the plan it carries, not a new one.
    """
    if arrays is None or profile.statistics.damage is None:
        return []
    damage = arrays["damage_mean"].astype(np.float64)
    try:
        planned = solver_of(profile, damage, measured=arrays)
        even = solver_of(profile, damage, measured=arrays, rule="uniform", granularity="head", mode="exact")
    except (MismatchError, UsageError):  # nothing to merge
        return []
    rows = []
    for budget in sorted({*GRID, profile.plan.asked}):
        own = budget == profile.plan.asked
        try:
            cost = profile.plan.predicted_damage if own else total(planned.decide(budget))
            uniform = total(even.decide(budget))
        except (MismatchError, UsageError):  # below the protected tokens, or in threshold mode without thresholds
            continue
        rows.append(Cost(budget, cost, uniform, merged_bytes(profile, budget)))
    return rows


def arrays_beside(profile: Profile, path: Path) -> dict[str, NDArray[np.generic]] | None:
    """The arrays beside the profile saved at `path`, or None where they are not there.

    Raises KVProfileError where the file is not the one the profile was saved with.
    """
    beside = profile.statistics.arrays
    return load_arrays(profile, path) if beside is not None and lies_at(locate(path).parent / beside.file) else None


def windows_planned(profile: Profile) -> bool:
    """True where a plan's bytes are those of all layers, the ones with a sliding window among them."""
    measured = profile.statistics.damage
    return profile.plan.bytes is not None and measured is not None and bool(measured.windows)


def merged_bytes(profile: Profile, budget: float) -> int | None:
    """Bytes of keys and values of the planned layers, at the calibration's length and dtype; None for an unknown dtype.

    The page's script computes the same for other lengths, batches and dtypes.
    """
    facts, size = profile.model, BYTES.get(profile.calibration.dtype)
    if size is None:
        return None
    tokens = profile.calibration.measured.tokens
    held = tokens * len(profile.attention_layers())
    if windows_planned(profile):
        held += len(facts.windowed_layers()) * min(tokens, (facts.window or 1) - 1)
    return round(budget * held * facts.kv_heads * 2 * facts.head_dim * size)
