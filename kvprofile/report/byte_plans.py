"""Plans for other bytes than the profile's, worked out beforehand: what the page's slider moves along."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import MismatchError, UsageError
from kvprofile.planning.evidence import Decision
from kvprofile.planning.plans import solver_of
from kvprofile.planning.solver import total
from kvprofile.report.figures import Subject

FINE, MIDDLE, COARSE = (
    0.005,
    0.01,
    0.05,
)  # steps up to .15, up to .5 and up to 1: damage changes most where bytes are few


def byte_plans(subject: Subject, policies: Sequence[str]) -> dict[str, Any] | None:
    """For rising fractions of a 16-bit cache what every head gets; None where slots are planned or no damage is at hand.

    A plan for bytes goes by what blocks, scales and offsets take, so the page does not solve: it shows plans that the solver
    made, with the plan's own settings. `share` and `damage` are float32, `policy` (in `policies`) and `pair` (in `pairs`,
    codecs of keys and values) are bytes, all in base64 by plan, layer and head. `window`: the pairs of sliding layers.
    """
    profile, arrays = subject.profile, subject.arrays
    if arrays is None or profile.plan.bytes is None or profile.statistics.damage is None:
        return None
    solver = solver_of(profile, arrays["damage_mean"].astype(np.float64), measured=arrays)
    amounts, found = [], []
    for amount in _grid(profile.plan.bytes):
        try:
            decided = solver.decide(amount)
        except (MismatchError, UsageError):  # below what protected tokens take, or threshold mode without thresholds
            continue
        amounts.append(amount)
        found.append(decided)
    if not found:
        return None
    pairs = sorted({pair for decided in found for pair in (*decided.pairs, *decided.windows)})
    places = {pair: place for place, pair in enumerate(pairs)}
    names = {name: place for place, name in enumerate(policies)}
    return {
        "amounts": amounts,
        "totals": [total(decided) for decided in found],
        "pairs": pairs,
        "share": _encoded(np.array([decided.share for decided in found], dtype="<f4")),
        "damage": _encoded(np.array([_damage(decided) for decided in found], dtype="<f4")),
        "policy": _encoded(np.array([[names[name] for name in decided.policy.flat] for decided in found], dtype="u1")),
        "window": _encoded(np.array([[places[pair] for pair in decided.windows] for decided in found], dtype="u1")),
        "pair": _encoded(np.array([[places[pair] for pair in decided.pairs] for decided in found], dtype="u1")),
    }


def _grid(own: float) -> list[float]:
    """Fractions up to 1, the profile's own among them."""
    ends = ((0.0, 0.15, FINE), (0.15, 0.5, MIDDLE), (0.5, 1.0, COARSE))
    steps = [low + step * place for low, high, step in ends for place in range(1, round((high - low) / step) + 1)]
    return sorted({own, *(round(amount, 3) for amount in steps)})


def _damage(decided: Decision) -> NDArray[np.float64]:
    return np.zeros(decided.share.shape) if decided.damage is None else decided.damage


def _encoded(numbers: NDArray[Any]) -> str:
    return base64.b64encode(numbers.tobytes()).decode()
