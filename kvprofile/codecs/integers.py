"""Whole numbers of 2 to 8 bits: every vector's range in equal steps, after a rotation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvprofile.codecs.packing import look_up, pack, packed_bytes, symbol_table, unpack
from kvprofile.codecs.rotation import turn
from kvprofile.codecs.scales import NBYTES, rounded_up


@dataclass(frozen=True)
class Integers:
    """Codes of `bits` bits from 0 to 2**bits - 1, and a scale and a centre of every vector in bfloat16.

    x is stored as round((x - centre) / scale + (2**bits - 1) / 2). The centre of the range is what is rounded to 16 bits, as
    it is the smaller the more alike both ends are, and the scale is taken from the rounded centre: both ends are within reach,
    no element is off by more than half a step, and a constant vector comes back almost exactly.
    """

    name: str
    bits: int
    rotated: bool = True

    @property
    def half(self) -> float:
        """The middle of the codes."""
        return (2**self.bits - 1) / 2

    def nbytes(self, dim: int) -> int:
        """Codes, scale and centre."""
        return packed_bytes(dim, self.bits) + 2 * NBYTES

    def encode(self, vectors: Tensor, mean: Tensor | None = None) -> tuple[Tensor, ...]:
        """Two parts: packed codes, and `(scale, centre)`."""
        vectors = turn(vectors.float() if mean is None else vectors.float() - mean)
        # Both at once, `aminmax`, takes ten times as long on CPUs.
        low, high = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)
        centre = (low / 2 + high / 2).bfloat16()
        near = centre.float()
        scale = rounded_up(torch.maximum(high - near, near - low) / self.half)
        codes = ((vectors - near) / scale.float()).add_(self.half).round_().clamp_(0, 2 * self.half)
        return pack(codes.to(torch.uint8), self.bits), torch.cat([scale, centre], -1)

    def decode(self, parts: Sequence[Tensor], dim: int, mean: Tensor | None = None) -> Tensor:
        """Code times scale, and the least value on top."""
        packed, facts = parts
        scale, centre = facts.float().split(1, -1)
        if self.bits < 6:
            codes = look_up(packed, self.bits, dim, _numbers(self.bits, packed.device))
        else:
            codes = unpack(packed, self.bits, dim)
        # Two passes in place: torch's fused multiply and add is ten times slower with one scale a row, on CPUs.
        vectors = codes.mul_(scale).add_(centre - self.half * scale)
        return vectors if mean is None else vectors.add_(turn(mean.float()))


@lru_cache(maxsize=32)
def _numbers(bits: int, device: torch.device) -> Tensor:
    """The table of symbols in which every code stands for itself."""
    with torch.inference_mode(False):
        return symbol_table(torch.arange(1 << bits), bits).to(device, non_blocking=True)
