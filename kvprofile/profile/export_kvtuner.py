"""A profile's measured damage as KVTuner's table of bits: how many every layer's keys and values get (arXiv 2502.04420)."""

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import UsageError
from kvprofile.planning.objectives import codec_curves, window_curves
from kvprofile.profile.profile import Profile

BITS = {8: "int8", 4: "int4", 2: "int2"}  # of KVTuner's tables, with the codec whose damage stands for them
UNMEASURED = 8


def kvtuner(profile: Profile, bits: float = 4.0) -> str:
    """The table as YAML, `layer: {nbits_key, nbits_value}`: the least damage at a mean of `bits`, of all sets of pairs.

    The mean is over keys and values of the layers that were measured, every token kept. Layers that were not get 8 bits.
    Where windows were measured, sliding layers are chosen for as others are.

    Raises UsageError for a mean outside 2 to 8 and where the codecs' damage was not measured, KVProfileError where the arrays
    are not at hand.
    """
    if not min(BITS) <= bits <= max(BITS):
        raise UsageError(f"--bits {bits:g} is no mean of 8, 4 and 2 bits; expected from 2 to 8, for example 4")
    layers, damage = _damage(profile)
    chosen = dict(zip(layers, choose(damage, bits).tolist(), strict=True))
    lines = []
    for layer in range(profile.model.layers):
        keys, values = chosen.get(layer, (UNMEASURED, UNMEASURED))
        lines += [f"{layer}:", f"  nbits_key: {keys}", f"  nbits_value: {values}"]
    return "\n".join(lines) + "\n"


def choose(damage: NDArray[np.float64], mean: float) -> NDArray[np.int64]:
    """Bits of every layer's keys and values `(layers, 2)`, from damages `(layers, 2, len(BITS))`, at a mean of at most `mean`.

    The least sum there is: by dynamic programming over the bits that are spent, two at a time.
    """
    items, costs = damage.reshape(-1, len(BITS)), np.array(list(BITS)) // 2
    room = int(mean * len(items) / 2 + 1e-9)
    best = np.full((len(items) + 1, room + 1), np.inf)
    best[0, 0] = 0.0
    for item, harms in enumerate(items):
        for cost, harm in zip(costs.tolist(), harms.tolist(), strict=True):
            there = best[item, : max(0, room + 1 - cost)] + harm
            best[item + 1, cost:] = np.minimum(best[item + 1, cost:], there)
    found, spent = [], int(best[-1].argmin())
    for item in reversed(range(len(items))):
        before = [
            best[item, spent - cost] + harm if cost <= spent else np.inf
            for cost, harm in zip(costs, items[item], strict=True)
        ]
        place = int(np.argmin(before))
        found.append(2 * int(costs[place]))
        spent -= int(costs[place])
    return np.array(found[::-1]).reshape(damage.shape[:2])


def _damage(profile: Profile) -> tuple[list[int], NDArray[np.float64]]:
    """Layers, and what `BITS` bits of keys and of values do to each: `(layers, 2, len(BITS))`, its heads summed."""
    measured = profile.statistics.damage
    codecs = list(BITS.values())
    if measured is None or not set(codecs) <= set(measured.codecs):
        raise UsageError(
            f"no damage was measured for {', '.join(codecs)}, by which bits are chosen; calibrate anew, with --codec auto"
        )
    places = [measured.codecs.index(codec) for codec in codecs]
    arrays, objective = profile.arrays(), profile.plan.objective
    # At the largest share that was measured, where nothing is merged.
    parts = [np.stack([one[:, 0, :, -1].sum(1) for one in codec_curves(arrays, profile.statistics, objective)], axis=1)]
    if measured.windows:
        parts.append(np.stack([one.sum(1) for one in window_curves(arrays, profile.statistics, objective)], axis=1))
    return [*profile.attention_layers(), *measured.windows], np.concatenate(parts)[..., places]
