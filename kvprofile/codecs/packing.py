"""Codes of 2, 3, 4, 6 or 8 bits in bytes, without a bit to spare.

Neighbouring codes make a *symbol*: four of 2 bits or two of 4 bits fill a byte, two of 3 bits or one of 6 bits fill 6 bits.
Symbols of 6 bits lie four in three bytes: the first three quarters of them in the low bits, a byte each, the last quarter in
the two high bits of all. A symbol is read through a table of all the values it can stand for, many codes at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (2, 3, 4, 6, 8)
_PER_SYMBOL = {2: 4, 3: 2, 4: 2, 6: 1, 8: 1}  # codes
# Torch takes single elements faster than rows: several float32 are taken as one wide element.
_WIDE = {2: torch.float64, 4: torch.complex128}


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes of `dim` codes."""
    symbols = -(-dim // _PER_SYMBOL[bits])
    return 3 * -(-symbols // 4) if bits in (3, 6) else symbols


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., dim)` uint8 below 2**bits, as bytes `(..., packed_bytes(dim, bits))`."""
    codes = _padded(codes, _PER_SYMBOL[bits]).unflatten(-1, (-1, _PER_SYMBOL[bits]))
    symbols = codes[..., 0]
    for place in range(1, _PER_SYMBOL[bits]):
        symbols = symbols | codes[..., place] << bits * place
    return _pack_sixes(symbols) if bits in (3, 6) else symbols.contiguous()


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The codes `(..., dim)` as float32."""
    symbols = _unpack_sixes(packed) if bits in (3, 6) else packed
    return symbols[..., :dim].float()


def symbol_table(values: Tensor, bits: int) -> Tensor:
    """What every symbol stands for where code i stands for `values[i]`: `(symbols,)`, each several float32 in one element."""
    per = _PER_SYMBOL[bits]
    symbols = torch.arange(1 << bits * per)
    codes = torch.stack([symbols >> bits * place & (1 << bits) - 1 for place in range(per)], -1)
    return values.float()[codes].view(_WIDE[per]).squeeze(-1)


def look_up(packed: Tensor, bits: int, dim: int, table: Tensor) -> Tensor:
    """The values `(..., dim)` in float32 of packed codes, by a `symbol_table` on their device."""
    symbols = _unpack_sixes(packed) if bits == 3 else packed
    wide = table.index_select(0, symbols.flatten().int())
    if wide.is_complex():
        wide = torch.view_as_real(wide)
    width = symbols.shape[-1] * _PER_SYMBOL[bits]
    return wide.view(torch.float32).view(*symbols.shape[:-1], width)[..., :dim]


def _padded(codes: Tensor, multiple: int) -> Tensor:
    short = -codes.shape[-1] % multiple
    return F.pad(codes, (0, short)) if short else codes


def _pack_sixes(symbols: Tensor) -> Tensor:
    symbols = _padded(symbols, 4)
    quarter = symbols.shape[-1] // 4
    low, high = symbols.split([3 * quarter, quarter], -1)
    return low | torch.cat([high & 3, high >> 2 & 3, high >> 4], -1) << 6


def _unpack_sixes(packed: Tensor) -> Tensor:
    first, second, third = (packed >> 6).chunk(3, -1)
    return torch.cat([packed & 63, first | second << 2 | third << 4], -1)
