"""Rows become estimates: a mean with its interval for every method and measure, and paired differences."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvprofile.evaluate.intervals import bootstrap, equal_groups
from kvprofile.evaluate.methods import FULL
from kvprofile.evaluate.rows import Row

OVER = 1.05
"""Slots over slots asked from which a method is not compared as an equal: a short context may be a few tokens over."""

Estimate = dict[str, Any]
"""`mean` and its 95% bootstrap `interval` over documents or questions; every group of a task counts the same."""


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better: distances and likelihoods, not scores."""
    return measure.endswith((" KL", " NLL"))


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Names of all measures, in the order they were measured."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per method and budget: slots asked and kept, bytes, and its measures.

    A measure has its estimate, the paired difference from the full cache (`against_full`), and that from the best other
    method of the same budget (`best_rival`, `against_best_rival`). The best is the best by mean on these very rows, so
    the difference from it is, if anything, unkind to the method. A method that keeps more than it was asked to, because
    its protected tokens take more, is `over_budget` and nobody's rival.
    """
    by_method = _by_method(rows)
    over = {key for key, own in by_method.items() if _mean([row.slots for row in own]) > OVER * key[1]}
    summary = []
    for (name, budget), own in by_method.items():
        entry: dict[str, Any] = {
            "method": name,
            "slots_asked": budget,
            "slots": _mean([row.slots for row in own]),
            "over_budget": (name, budget) in over,
            "slots_range": [round(extreme(row.slots for row in own), 6) for extreme in (min, max)],
            "bytes": _mean([row.nbytes / full.nbytes for row, full in _pairs(own, by_method[FULL, 1.0])]),
            "measures": {},
        }
        for measure in measures_of(own):
            estimate = _estimate(own, measure)
            if name != FULL:
                rivals = [
                    other
                    for other, key in ((rows, key) for key, rows in by_method.items())
                    if key[1] == budget and key[0] not in (name, FULL) and key not in over
                ]
                estimate["against_full"] = _difference(own, by_method[FULL, 1.0], measure)
                if rivals:
                    rival = _best(rivals, measure)
                    estimate["best_rival"] = rival[0].method
                    estimate["against_best_rival"] = _difference(own, rival, measure)
            entry["measures"][measure] = estimate
        summary.append(entry)
    return summary


def by_group(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means of every group of every bench by method and budget: the kinds of text, the parts of a task."""
    groups = dict.fromkeys((row.bench, row.group) for row in rows)
    found = []
    for bench, group in groups:
        inside = [row for row in rows if (row.bench, row.group) == (bench, group)]
        for (name, budget), own in _by_method(inside).items():
            values = {measure: _estimate(own, measure) for measure in measures_of(own)}
            count = len(own)
            found.append(
                {
                    "bench": bench,
                    "group": group,
                    "method": name,
                    "slots_asked": budget,
                    "count": count,
                    "measures": values,
                }
            )
    return found


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.budget), []).append(row)
    # The full cache first, then by budget, from much to little.
    return dict(sorted(found.items(), key=lambda item: -item[0][1] if item[0][0] != FULL else -2))


def _best(rivals: Sequence[list[Row]], measure: str) -> list[Row]:
    sign = 1 if lower_is_better(measure) else -1
    return min(rivals, key=lambda rows: sign * _estimate(rows, measure)["mean"])


def _estimate(rows: Sequence[Row], measure: str) -> Estimate:
    chosen = [row for row in rows if measure in row.values]
    return _weighted([row.values[measure] for row in chosen], [row.group for row in chosen])


def _difference(own: Sequence[Row], other: Sequence[Row], measure: str) -> Estimate:
    pairs = [(row, rival) for row, rival in _pairs(own, other) if measure in row.values]
    return _weighted(
        [row.values[measure] - rival.values[measure] for row, rival in pairs], [row.group for row, _ in pairs]
    )


def _pairs(own: Sequence[Row], other: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same document or question."""
    place = {(row.bench, row.unit): row for row in other}
    return [(row, place[row.bench, row.unit]) for row in own]


def _weighted(values: list[float], groups: list[str]) -> Estimate:
    weights = equal_groups(groups)
    low, high = bootstrap(values, weights)
    return {"mean": round(float(np.average(values, weights=weights)), 6), "interval": [low, high]}


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6)
