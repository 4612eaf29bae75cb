"""The codecs once more, by their definitions: plain loops in float64 over one vector at a time."""

import math
import struct


def rudin_shapiro(index):
    """-1 where the binary index has an odd number of "11"."""
    digits = bin(index)[2:]
    return (-1) ** sum(digits[place : place + 2] == "11" for place in range(len(digits)))


def turned(vector):
    """Blocks of powers of two, the largest first; in each a Walsh-Hadamard transform of the vector with its signs flipped."""
    out, begin = [], 0
    while begin < len(vector):
        size = 2 ** math.floor(math.log2(len(vector) - begin))
        block = vector[begin : begin + size]
        for row in range(size):
            terms = (rudin_shapiro(i) * (-1) ** bin(i & row).count("1") * block[i] for i in range(size))
            out.append(math.fsum(terms) / math.sqrt(size))
        begin += size
    return out


def codes_of(packed, bits, dim):
    """Read codes from bytes by the layout that `packing` describes, bit by bit."""
    per = {2: 4, 3: 2, 4: 2, 6: 1, 8: 1}[bits]
    symbols = list(packed)
    if bits in (3, 6):
        quarter = len(packed) // 3
        last = [sum((packed[third * quarter + i] // 64) * 4**third for third in range(3)) for i in range(quarter)]
        symbols = [byte % 64 for byte in packed] + last
    return [symbol // 2 ** (bits * place) % 2**bits for symbol in symbols for place in range(per)][:dim]


def float8(byte, exponent_bits):
    """An 8-bit float with so many bits of exponent, denormal numbers included."""
    mantissa_bits = 7 - exponent_bits
    sign = -1 if byte & 128 else 1
    exponent, mantissa = divmod(byte % 128, 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    if not exponent:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def bfloat16(number):
    """The nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", rounded))[0]
