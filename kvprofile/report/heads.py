"""Which heads give up their slots most cheaply, and which layers and heads are worth a picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvprofile.planning.objectives import OBJECTIVES
from kvprofile.profile.profile import Profile

SHOWN = 6  # similarity maps

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Head:
    """One KV head: what it costs to bring it alone to the plan's budget, and what the plan does with it.

    damage: nats per token under its cheapest policy. ratio: slots kept at the common threshold. cosine: median similarity of
    neighbouring keys.
    """

    layer: int
    head: int
    damage: float | None
    ratio: float
    cosine: float | None
    share: float
    policy: str


def ranked(profile: Profile, arrays: Arrays | None) -> list[Head]:
    """The merged layers' heads, the most mergeable first: by damage where it was measured, otherwise by ratio."""
    at = common_threshold(profile)
    damage = head_damage(profile, arrays)
    cosine = None if arrays is None else median_cosine(arrays["key_histogram"])
    heads = [
        Head(
            layer.layer,
            index,
            None if damage is None else float(damage[layer.layer, index]),
            profile.statistics.layers[layer.layer].ratio[index][at],
            None if cosine is None else float(cosine[layer.layer, index]),
            plan.share,
            plan.policy,
        )
        for layer in profile.plan.layers
        for index, plan in enumerate(layer.heads)
    ]
    return sorted(heads, key=lambda head: (head.ratio if head.damage is None else head.damage, head.ratio))


def head_damage(profile: Profile, arrays: Arrays | None) -> NDArray[np.float64] | None:
    """Damage `(layers, kv_heads)` of every head alone at the plan's budget by its cheapest policy; NaN where not measured."""
    measured = profile.statistics.damage
    if arrays is None or measured is None:
        return None
    weights = OBJECTIVES[profile.plan.objective]
    mean = arrays["damage_mean"].astype(np.float64)
    curves = (mean @ np.array([weights.get(kind, 0.0) for kind in measured.kinds])).min(axis=1)
    curves = np.concatenate([curves, np.zeros((*curves.shape[:2], 1))], axis=2)
    budgets = [*measured.budgets, 1.0]
    merged = profile.attention_layers()
    found = np.full((profile.model.layers, profile.model.kv_heads), np.nan)
    for row, layer in enumerate(merged):
        for head in range(profile.model.kv_heads):
            found[layer, head] = np.interp(profile.plan.budget, budgets, curves[row, head])
    return found


def median_cosine(histogram: NDArray[np.generic]) -> NDArray[np.float64]:
    """Median of the cosines counted in `(..., bins)` of equal width over [-1, 1], to a bin's width."""
    below = histogram.astype(np.int64).cumsum(axis=-1)
    index = (below * 2 >= below[..., -1:]).argmax(axis=-1)
    return (index + 0.5) * (2 / histogram.shape[-1]) - 1


def common_threshold(profile: Profile) -> int:
    """Index of the threshold at which the layers' mean ratio is nearest to the budget."""
    statistics = profile.statistics
    mean = np.mean([np.mean(statistics.layers[layer].ratio, axis=0) for layer in seen_layers(profile)], axis=0)
    return int(np.abs(mean - profile.plan.budget).argmin())


def seen_layers(profile: Profile) -> list[int]:
    """Layers that have keys: those of hybrid models without any have empty statistics."""
    return [entry.layer for entry in profile.statistics.layers if np.max(entry.ratio) > 0]


def chosen_heads(profile: Profile, layers: list[int] | None, heads: list[int] | None) -> list[tuple[int, int]]:
    """Layer and head of the similarity maps: all pairs of those asked for, otherwise `SHOWN` spread over depth and heads.

    Merged layers come before layers that keep their stock cache.
    """
    count = profile.model.kv_heads
    merged = profile.attention_layers()
    if layers is None:
        others = [layer for layer in seen_layers(profile) if layer not in merged]
        layers = sorted(_spread(merged, SHOWN) + _spread(others, SHOWN - len(merged)))
        if heads is None:
            return [(layer, turn % count) for turn, layer in enumerate(layers)]
    return [(layer, head) for layer in dict.fromkeys(layers) for head in dict.fromkeys(heads or [0])]


def _spread(items: list[int], count: int) -> list[int]:
    """At most so many of the items, from the first to the last."""
    if count >= len(items):
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, max(0, count)).round().astype(int)]
