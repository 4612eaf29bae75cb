"""The field's rules for spending a budget, beside our own solver: what was measured and a budget in, a share per layer out.

Each rule is a pure function in a file of its own, and an entry in `PUBLISHED` with the arrays it goes by. They decide the
allocation alone: any policy can run under them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.planning.allocate import STEPS
from kvprofile.planning.reach import check_reach
from kvprofile.planning.rules.cake import cake
from kvprofile.planning.rules.dynamickv import dynamickv
from kvprofile.planning.rules.fit import on_grid
from kvprofile.planning.rules.prefixkv import prefixkv
from kvprofile.planning.rules.pyramidkv import pyramidkv
from kvprofile.planning.rules.squeeze import squeeze


@dataclass(frozen=True)
class Rule:
    """A rule and the arrays it takes, one row per merged layer; `depth` runs from 0 at the first of them to 1 at the last."""

    shares: Callable[..., NDArray[np.float64]]
    needs: tuple[str, ...]


PUBLISHED: dict[str, Rule] = {
    "pyramidkv": Rule(pyramidkv, ("depth",)),
    "dynamickv": Rule(dynamickv, ("window_histogram",)),
    "prefixkv": Rule(prefixkv, ("mass_coverage",)),
    "cake": Rule(cake, ("window_entropy", "window_variance")),
    "squeeze": Rule(squeeze, ("attention_cosine",)),
}


def rule_shares(
    name: str, measured: Mapping[str, NDArray[np.generic]], layers: Sequence[int], budget: float, *, floor: float
) -> NDArray[np.float64]:
    """Shares `(len(layers),)` by a rule, on the solver's grid, their mean the budget.

    `measured` are a profile's arrays, a row for every layer of the model; `layers` are those that are merged. `floor` is the
    share that protected tokens take of every layer.

    Raises UsageError where the profile lacks what the rule goes by, MismatchError where the floor exceeds the budget.
    """
    rule = PUBLISHED[name]
    index = list(layers)
    rows = {name: array[index].astype(np.float64) for name, array in measured.items() if name in rule.needs}
    rows["depth"] = np.linspace(0.0, 1.0, len(index))
    missing = [name for name in rule.needs if name not in rows or not np.isfinite(rows[name]).all()]
    if missing:
        raise UsageError(
            f"the profile does not hold what the rule {name} goes by ({', '.join(missing)}): it was made before that was "
            "measured, or the model does not show it; calibrate anew, or give another --rule"
        )
    floor = math.ceil(floor * STEPS - 1e-9) / STEPS
    check_reach(budget, floor, because="protected tokens keep at least {lowest} of the slots of every layer")
    return on_grid(rule.shares(*(rows[name] for name in rule.needs), budget=budget, floor=floor), budget)
