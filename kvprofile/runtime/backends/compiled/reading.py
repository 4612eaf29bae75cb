"""Stored vectors as float32: in place where they are, else into a little room that stays in the processor's cache."""

from numba import float32, int32, njit, uint32

from kvprofile.runtime.backends.compiled.low_level import byte_row, float_of, float_rows, short_row
from kvprofile.runtime.backends.compiled.records import BFLOAT16, BYTES, FLOAT16, FLOAT32, NIBBLES, SIXES

# Sums may be reordered and fused; what is not finite stays what it is. Python calls none of these functions.
PLAIN = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, **PLAIN}
_WIDER = float32(2.0**112)  # the difference of the exponents' biases of float32 and float16


@njit(**FAST)
def of_bfloat16(bits):
    """Its bits are the upper half of the float32's."""
    return float_of(int32(uint32(bits) << uint32(16)))


@njit(**FAST)
def of_float16(bits):
    """Exponent and digits moved to float32's places, and scaled; the largest exponent means infinity and no number."""
    rest = uint32(bits & 0x7FFF) << uint32(13)
    sign = uint32(bits & 0x8000) << uint32(16)
    size = float_of(int32(rest)) * _WIDER
    if rest >= uint32(0x0F800000):
        size = float_of(int32(rest | uint32(0x7F800000)))
    return -size if sign else size


@njit(**FAST)
def from_16_bits(kind, address, count, into):
    """`count` numbers of 16 bits into the first elements of an array."""
    words = short_row(address, count)
    if kind == BFLOAT16:
        for place in range(count):
            into[place] = of_bfloat16(words[place])
    else:
        for place in range(count):
            into[place] = of_float16(words[place])


@njit(**FAST)
def vectors(part, first, offset, count, dim, room, scratch):  # noqa: PLR0917
    """Vectors `first` to `first + count` of a part, `offset` elements further on: `(count, dim or more)` float32."""
    start = first * part.width + offset
    if part.kind == FLOAT32:
        return float_rows(part.elements + 4 * start, count, part.width)
    into = float_rows(scratch, count, room)
    if part.kind in (BFLOAT16, FLOAT16):
        for place in range(count):
            from_16_bits(part.kind, part.elements + 2 * (start + place * part.width), dim, into[place])
        return into
    for place in range(count):
        facts = short_row(part.facts + 2 * (first + place) * part.facts_width, part.facts_width)
        scale, centre = of_bfloat16(facts[0]), float32(0)
        if part.facts_width > 1:
            centre = of_bfloat16(facts[1])
        vector = into[place]
        _unpack(part, byte_row(part.elements + start + place * part.width, part.width), vector)
        shift = centre - part.half * scale
        for element in range(dim):
            vector[element] = vector[element] * scale + shift
    return into


@njit(**FAST)
def _unpack(part, stored, into):
    """The codes of a vector, or the levels they stand for."""
    if part.kind == BYTES:
        for place in range(part.width):
            into[place] = float32(stored[place])
    elif part.kind == NIBBLES:
        for place in range(part.width):
            into[2 * place] = float32(stored[place] & 15)
            into[2 * place + 1] = float32(stored[place] >> 4)
    else:
        table = float_rows(part.table, 256, part.per)
        if part.kind == SIXES:
            _look_up_sixes(table, part.per, part.width // 3, stored, into)
        else:
            for place in range(part.width):
                levels = table[stored[place]]
                for code in range(part.per):
                    into[place * part.per + code] = levels[code]


@njit(**FAST)
def _look_up_sixes(table, per, quarter, stored, into):
    """Symbols of six bits: three quarters of them in the low bits of a byte, the last in the two high bits of all."""
    for place in range(3 * quarter):
        levels = table[stored[place] & 63]
        for code in range(per):
            into[place * per + code] = levels[code]
    for place in range(quarter):
        high = stored[place] >> 6 | stored[place + quarter] >> 6 << 2 | stored[place + 2 * quarter] >> 6 << 4
        levels = table[high]
        for code in range(per):
            into[(3 * quarter + place) * per + code] = levels[code]
