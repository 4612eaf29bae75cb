"""Bootstrap intervals over documents or questions."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`, with a fixed seed.

    With `weights` it is the weighted mean. Give it the differences of pairs for a paired interval.
    """
    drawn = np.random.default_rng(0).choice(len(values), size=(resamples, len(values)))
    means = np.average(
        np.asarray(values, dtype=np.float64)[drawn],
        axis=1,
        weights=None if weights is None else np.asarray(weights, dtype=np.float64)[drawn],
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 6), round(float(high), 6)


def equal_groups(groups: Sequence[str]) -> list[float]:
    """Weights under which every group counts the same, however many members it has; they sum up to 1."""
    return [1 / (len(set(groups)) * groups.count(group)) for group in groups]
