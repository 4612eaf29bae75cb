"""How the kernel reads what a codec has stored."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvprofile.codecs.floats import Floats
from kvprofile.codecs.integers import Integers
from kvprofile.codecs.packing import symbol_table
from kvprofile.codecs.plain import Plain
from kvprofile.codecs.table import CODECS
from kvprofile.codecs.turbo import Turbo, levels
from kvprofile.runtime.backends.compiled.records import BFLOAT16, BYTES, FLOAT16, FLOAT32, NIBBLES, SIXES, SYMBOLS

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@dataclass(frozen=True)
class Format:
    """A kind of `records.py`; where symbols stand for levels, the table `(symbols, per)` float32; the code that means zero."""

    kind: int
    table: Tensor | None = None
    half: float = 0.0


@lru_cache(maxsize=64)
def format_of(codec_name: str, dtype: torch.dtype) -> Format | None:
    """How vectors of a model of that dtype are read; None: the kernel cannot."""
    codec = CODECS[codec_name]
    if isinstance(codec, Plain):
        kind = KINDS.get(codec.dtype or dtype)
        return None if kind is None else Format(kind)
    if isinstance(codec, Integers) and codec.bits in (4, 8):
        return Format(BYTES if codec.bits == 8 else NIBBLES, half=codec.half)
    if isinstance(codec, Integers):
        return Format(*_by_table(torch.arange(1 << codec.bits), codec.bits), half=codec.half)
    if isinstance(codec, Turbo):
        return Format(*_by_table(levels(codec.bits), codec.bits))
    if isinstance(codec, Floats):
        return Format(SYMBOLS, torch.arange(256, dtype=torch.uint8).view(codec.dtype).float().view(-1, 1))
    return None


def _by_table(values: Tensor, bits: int) -> tuple[int, Tensor]:
    """The kind and the table of symbols in which code i stands for `values[i]`."""
    if bits == 6:
        return SIXES, values.float().view(-1, 1)
    table = symbol_table(values, bits)
    table = torch.view_as_real(table) if table.is_complex() else table
    return SIXES if bits == 3 else SYMBOLS, table.view(torch.float32).view(len(table), -1)
