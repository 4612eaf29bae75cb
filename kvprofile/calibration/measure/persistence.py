"""Persistence: does the compression ratio belong to the model or to the text?

KVMerger (arXiv 2407.08454, observation 2) reports that a layer's ratio at a given threshold is nearly the same for every
sample and task, without giving a variance. Here it is: the spread of the same layer's (or head's) ratio between samples and
between kinds of text, beside the spread between layers (or heads).
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from kvprofile.calibration.measure.moments import Moments
from kvprofile.calibration.measure.ratios import THRESHOLDS, CompressionRatios
from kvprofile.profile.schema import Persistence

LEVELS = (0.75, 0.5, 0.25)


def persistence(ratios: CompressionRatios, rule: str) -> list[Persistence]:
    """One row for each of the thresholds at which the mean ratio is nearest to 0.75, 0.5 and 0.25.

    Levels whose nearest threshold is off by more than 0.1 (protected tokens keep the ratio above) are left out.
    """
    index = ratios.rules.index(rule)
    moments = ratios.overall()
    seen = moments.count > 0  # hybrid models have layers without keys
    if not seen.any():
        return []
    overall = moments.mean[seen, index]
    layer_mean = overall[:, -1].mean(axis=0)
    rows = []
    for level in LEVELS:
        at = int(np.abs(layer_mean - level).argmin())
        if abs(layer_mean[at] - level) <= 0.1:
            rows.append(_row([ratios.kinds[kind] for kind in sorted(ratios.kinds)], seen, index, at, overall[:, :, at]))
    return rows


def _row(
    kinds: list[Moments], seen: NDArray[np.bool_], rule: int, at: int, overall: NDArray[np.float64]
) -> Persistence:
    """`overall` is `(layers, kv_heads + 1)`, the last column the layer as a whole."""
    means = np.stack([kind.mean[seen, rule, :, at] for kind in kinds])
    degrees = sum(int(kind.count.max()) - 1 for kind in kinds)
    within = np.sqrt(sum(kind.squares[seen, rule, :, at] for kind in kinds) / max(1, degrees))
    between = means.std(axis=0, ddof=1) if len(kinds) > 1 else None
    lowest = _lowest_rank_correlation(means[:, :, -1])
    return Persistence(
        threshold=float(THRESHOLDS[at]),
        ratio=round(float(overall[:, -1].mean()), 6),
        between_samples=_spread(within[:, -1]),
        between_kinds=None if between is None else _spread(between[:, -1]),
        between_layers=round(float(overall[:, -1].std(ddof=1)), 6) if len(overall) > 1 else 0.0,
        head_between_samples=_spread(within[:, :-1]),
        head_between_kinds=None if between is None else _spread(between[:, :-1]),
        between_heads=round(float(overall[:, :-1].std(ddof=1)), 6) if overall[:, :-1].size > 1 else 0.0,
        rank_correlation=None if lowest is None else round(lowest, 6),
    )


def _lowest_rank_correlation(means: NDArray[np.float64]) -> float | None:
    """Over pairs of kinds, of the layers' ratios `(kinds, layers)`; None where layers cannot be ranked."""
    if len(means) < 2 or means.shape[1] < 3 or (np.ptp(means, axis=1) == 0).any():
        return None
    return min(float(spearmanr(first, second).statistic) for first, second in combinations(means, 2))


def _spread(deviations: NDArray[np.float64]) -> float:
    """Root mean square of standard deviations."""
    return round(float(np.sqrt(np.mean(np.square(deviations)))), 6)
