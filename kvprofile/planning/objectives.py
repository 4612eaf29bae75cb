"""What counts as damage: the kinds of probe an objective adds up, and the curves that come of it."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.planning.solve import interpolate
from kvprofile.profile.schema import Statistics

OBJECTIVES = {
    "balanced": {"recall": 1.0, "continuation": 1.0},
    "recall": {"recall": 1.0},
    "continuation": {"continuation": 1.0},
    "all": {"recall": 1.0, "continuation": 1.0, "facts": 1.0, "lookup": 1.0},
}


def damage_curves(damage: NDArray[np.floating], statistics: Statistics, objective: str) -> NDArray[np.float64]:
    """The objective's sum over kinds of probe, the last axis: of damage `(layers, policies, kv_heads, budgets)`.

    Raises UsageError where a kind that the objective counts was not measured.
    """
    kinds = statistics.damage.kinds if statistics.damage is not None else []
    weights = OBJECTIVES[objective]
    if missing := weights.keys() - set(kinds):
        raise UsageError(
            f"the objective {objective} needs probes of {', '.join(sorted(weights))}, and none of {', '.join(sorted(missing))} "
            "were measured; choose another, or calibrate anew with --probes, for example --probes facts=4,lookups=8"
        )
    return damage.astype(np.float64) @ np.array([weights.get(kind, 0.0) for kind in kinds])


def codec_curves(
    arrays: Mapping[str, NDArray[np.generic]], statistics: Statistics, objective: str
) -> list[NDArray[np.float64]]:
    """What codecs of keys do, and of values: `(layers, policies, kv_heads, shares, codecs)` each, the objective's sum.

    Raises UsageError where the arrays do not hold it.
    """
    return _both(arrays, ("key_codec_damage", "value_codec_damage"), statistics, objective)


def window_curves(
    arrays: Mapping[str, NDArray[np.generic]], statistics: Statistics, objective: str
) -> list[NDArray[np.float64]]:
    """What codecs of keys do to sliding layers, and of values: `(layers, kv_heads, codecs)` each, the objective's sum.

    Raises UsageError where the arrays do not hold it.
    """
    return _both(arrays, ("key_window_damage", "value_window_damage"), statistics, objective)


def _both(
    arrays: Mapping[str, NDArray[np.generic]], names: tuple[str, str], statistics: Statistics, objective: str
) -> list[NDArray[np.float64]]:
    found = [arrays.get(name) for name in names]
    if any(array is None for array in found):
        raise UsageError("the codecs' damage lies in the arrays beside the profile; give them all, as `measured`")
    return [damage_curves(np.asarray(array), statistics, objective) for array in found]


def predict(
    cost: NDArray[np.float64], statistics: Statistics, chosen: NDArray[np.str_], share: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Damage of every head `(layers, kv_heads)` at its share; None where a policy's damage was not measured."""
    assert statistics.damage is not None  # the caller has curves
    names = statistics.damage.policies
    if not set(chosen.ravel().tolist()) <= set(names):
        return None
    index = np.vectorize(names.index, otypes=[np.int64])(chosen)
    rows, heads = np.indices(chosen.shape)
    curves = np.concatenate([cost[rows, index, heads], np.zeros((*chosen.shape, 1))], axis=-1)
    return interpolate(share, np.array([*statistics.damage.budgets, 1.0]), curves)


def best_single(statistics: Statistics, cost: NDArray[np.float64] | None, budget: float) -> str:
    """The policy with the least predicted damage if every head keeps the budget."""
    if cost is None or statistics.damage is None:
        return statistics.policy
    budgets = [*statistics.damage.budgets, 1.0]
    totals = np.append(cost.sum(axis=(0, 2)), np.zeros((cost.shape[1], 1)), axis=1)
    return statistics.damage.policies[int(np.argmin([np.interp(budget, budgets, total) for total in totals]))]
