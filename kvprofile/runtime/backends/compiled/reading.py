"""Stored vectors as float32: in place where they are, else into a little room that stays in the processor's cache."""

from numba import float32, int32, int64, njit, uint32

from kvprofile.runtime.backends.compiled.low_level import byte_row, float_of, float_row, float_rows, short_row
from kvprofile.runtime.backends.compiled.records import BFLOAT16, BYTES, FLOAT16, FLOAT32, NIBBLES, SIXES, SYMBOLS

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
def unpacked(kind, elements, start, width, count, dim, room, scratch):  # noqa: PLR0917
    """Vectors that are stored as numbers, from element `start` on, `width` from one to the next: `(count, dim or more)`."""
    if kind == FLOAT32:
        return float_rows(elements + 4 * start, count, width)
    into = float_rows(scratch, count, room)
    for place in range(count):
        from_16_bits(kind, elements + 2 * (start + place * width), dim, into[place])
    return into


@njit(**FAST)
def vectors(part, first, count, dim, room, scratch):  # noqa: PLR0917
    """Vectors `first` to `first + count` of a part: `(count, dim or more)` float32."""
    kind, width = part.kind, part.width
    start = first * width
    if kind in (FLOAT32, BFLOAT16, FLOAT16):
        return unpacked(kind, part.elements, start, width, count, dim, room, scratch)
    into = float_rows(scratch, count, room)
    # The record's numbers are read once: compiled code has to expect that what is written lies over them.
    stored, number, half = byte_row(part.elements + start, count * width), part.facts_width, part.half
    facts = short_row(part.facts + 2 * first * number, count * number)
    if kind in (SYMBOLS, SIXES):
        _look_up(float_row(part.table, 256 * part.per), part.per, kind == SIXES, width, stored, into)
    for place in range(count):
        vector, codes, scale = (
            into[place],
            stored[place * width : (place + 1) * width],
            of_bfloat16(facts[place * number]),
        )
        shift = of_bfloat16(facts[place * number + 1]) - half * scale if number > 1 else float32(0)
        if kind == BYTES:
            for element in range(width):
                vector[element] = float32(codes[element]) * scale + shift
        elif kind == NIBBLES:
            for pair in range(width):
                vector[2 * pair] = float32(int32(codes[pair] & 15)) * scale + shift
                vector[2 * pair + 1] = float32(int32(codes[pair] >> 4)) * scale + shift
        else:
            for element in range(dim):
                vector[element] = vector[element] * scale + shift
    return into


@njit(**FAST)
def _look_up(table, per, sixes, width, stored, into):  # noqa: PLR0917
    """What the symbols of vectors stand for, `per` numbers each, into the rows of `(count, room)`."""
    quarter = width // 3 if sixes else 0
    for row in range(len(into)):
        begin, vector = row * width, into[row]
        for place in range(width + quarter):
            if not sixes:
                symbol = int64(stored[begin + place])
            elif place < width:
                symbol = int64(stored[begin + place] & 63)
            else:
                # The last quarter of the symbols of six bits lies in the two high bits of the other three.
                low = begin + place - width
                symbol = int64(stored[low] >> 6 | stored[low + quarter] >> 6 << 2 | stored[low + 2 * quarter] >> 6 << 4)
            for code in range(per):
                vector[place * per + code] = table[symbol * per + code]
