"""Attention of a few queries over a tile of float32 keys and values, as running sums (flash attention, arXiv 2205.14135).

Four slots at a time, so that a query and a sum are loaded once for all of them.
"""

import numpy as np
from numba import float32, int32, njit

from kvprofile.runtime.backends.compiled.low_level import float_of
from kvprofile.runtime.backends.compiled.reading import FAST, PLAIN

NOTHING = float32(-1e30)  # the logit of what is not seen: finite, so that a query that sees nothing makes no NaN
_LEAST = float32(-87.0)  # below it an exponential is nothing


@njit(**FAST)
def exponential(x):
    """exp(x) of x up to 0, within 2 units in the last place (Cephes' polynomial); NaN stays NaN.

    Numba's own is a call for every number; this one is done for a whole register at a time.
    """
    bounded = _LEAST if x < _LEAST else x
    power = np.floor(bounded * float32(1.4426950408889634) + float32(0.5))
    rest = bounded - power * float32(0.693359375) - power * float32(-2.12194440e-4)
    sum_ = float32(1.9875691500e-4)
    sum_ = sum_ * rest + float32(1.3981999507e-3)
    sum_ = sum_ * rest + float32(8.3334519073e-3)
    sum_ = sum_ * rest + float32(4.1665795894e-2)
    sum_ = sum_ * rest + float32(1.6666665459e-1)
    sum_ = sum_ * rest + float32(5.0000001201e-1)
    sum_ = sum_ * rest * rest + rest + float32(1.0)
    found = sum_ * float_of((int32(power) + int32(127)) << int32(23))
    return float32(0) if x < _LEAST else found


@njit(**FAST)
def capped(logit, softcap):
    """The soft cap times the hyperbolic tangent of what a logit is of it."""
    size = exponential(float32(-2) * abs(logit / softcap))
    size = softcap * (float32(1) - size) / (float32(1) + size)
    return -size if logit < 0 else size


@njit(fastmath={"nnan", "nsz"}, **PLAIN)
def largest(logits, count, so_far):
    """A NaN may be passed over: its weight is one anyhow."""
    for place in range(count):
        so_far = max(so_far, logits[place])
    return so_far


@njit(**FAST)
def products(query, keys, count, dim, logits):
    """The logits of one query `(dim,)` over keys `(count, dim)`."""
    fours = count - count % 4
    for slot in range(0, fours, 4):
        key, second, third, fourth = keys[slot], keys[slot + 1], keys[slot + 2], keys[slot + 3]
        one, two, three, four = float32(0), float32(0), float32(0), float32(0)
        for element in range(dim):
            x = query[element]
            one += x * key[element]
            two += x * second[element]
            three += x * third[element]
            four += x * fourth[element]
        logits[slot], logits[slot + 1], logits[slot + 2], logits[slot + 3] = one, two, three, four
    for slot in range(fours, count):
        key, one = keys[slot], float32(0)
        for element in range(dim):
            one += query[element] * key[element]
        logits[slot] = one


@njit(**FAST)
def weigh(logits, count, top):
    """Logits become weights, the exponentials of what they are below `top`; returns their sum."""
    total = float32(0)
    for slot in range(count):
        weight = exponential(logits[slot] - top)
        logits[slot] = weight
        total += weight
    return total


@njit(**FAST)
def add_values(weights, values, asked, count, dim, sums):  # noqa: PLR0917
    """Add values `(count, dim)` by the weights `(asked, count)` to the sums `(asked, dim)`."""
    fours = count - count % 4
    for slot in range(0, fours, 4):
        value, second, third, fourth = values[slot], values[slot + 1], values[slot + 2], values[slot + 3]
        for place in range(asked):
            given, into = weights[place], sums[place]
            one, two, three, four = given[slot], given[slot + 1], given[slot + 2], given[slot + 3]
            for element in range(dim):
                into[element] += (
                    one * value[element] + two * second[element] + three * third[element] + four * fourth[element]
                )
    for slot in range(fours, count):
        value = values[slot]
        for place in range(asked):
            one, into = weights[place, slot], sums[place]
            for element in range(dim):
                into[element] += one * value[element]


@njit(**FAST)
def fold(weights, values, asked, count, dim, tops, totals, sums):  # noqa: PLR0917
    """Take a tile's logits `weights` `(asked, count)`, and values, into running sums, and leave the weights there."""
    for place in range(asked):
        logits = weights[place]
        top = largest(logits, count, tops[place])
        if top > tops[place]:
            less = exponential(tops[place] - top)
            totals[place] *= less
            into = sums[place]
            for element in range(dim):
                into[element] *= less
            tops[place] = top
        totals[place] += weigh(logits, count, top)
    add_values(weights, values, asked, count, dim, sums)
