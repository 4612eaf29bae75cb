"""TurboQuant (arXiv 2504.19874): direction and length apart. A turned unit vector's elements are nearly Gaussian, whatever the
vector was, so the best levels for them are known beforehand.

As published but for two things. The residual sketch that makes products unbiased is left out: it costs a bit an element, and
softmax has more use for that bit (vLLM leaves it out too). And what is stored is not the length, but the length over that of
the levels chosen, so that the vector read has the length it had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvprofile.codecs.packing import look_up, pack, packed_bytes, symbol_table
from kvprofile.codecs.rotation import turn
from kvprofile.codecs.scales import NBYTES, SMALLEST

# The Lloyd-Max levels of N(0, 1) above zero; those below mirror them.
_POSITIVE = {
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
_CELLS, _CELLS_PER_UNIT = 4096, 512  # of -4 to 4, beyond all levels


@dataclass(frozen=True)
class Turbo:
    """Codes of `bits` bits, one level each, and one scale of the vector in bfloat16."""

    name: str
    bits: int
    rotated: bool = True

    def nbytes(self, dim: int) -> int:
        """Codes and scale."""
        return packed_bytes(dim, self.bits) + NBYTES

    def encode(self, vectors: Tensor, mean: Tensor | None = None) -> tuple[Tensor, ...]:
        """Two parts: packed codes, and the scale."""
        vectors = turn(vectors.float() if mean is None else vectors.float() - mean)
        length = vectors.norm(dim=-1, keepdim=True)
        unit = vectors * (vectors.shape[-1] ** 0.5 / length.clamp_min(SMALLEST))
        packed = pack(_nearest(unit, self.bits), self.bits)
        chosen = look_up(packed, self.bits, vectors.shape[-1], _table(self.bits, packed.device))
        return packed, (length / chosen.norm(dim=-1, keepdim=True)).bfloat16()

    def decode(self, parts: Sequence[Tensor], dim: int, mean: Tensor | None = None) -> Tensor:
        """Level times scale."""
        packed, scale = parts
        vectors = look_up(packed, self.bits, dim, _table(self.bits, packed.device)).mul_(scale.float())
        return vectors if mean is None else vectors.add_(turn(mean.float()))


def levels(bits: int) -> Tensor:
    """All levels `(2**bits,)`, ascending."""
    positive = torch.tensor(_POSITIVE[bits])
    return torch.cat([-positive.flip(0), positive])


def _nearest(unit: Tensor, bits: int) -> Tensor:
    """The code of the level next to every number, uint8.

    Numbers are first rounded to a 512th, which the error does not feel; a search among the borders takes thirty times as long
    on CPUs. What is not finite gets some code: the vector's scale says what it was.
    """
    place = (unit * _CELLS_PER_UNIT + _CELLS // 2).nan_to_num_(0).clamp_(0, _CELLS - 1)
    return _codes(bits, unit.device).index_select(0, place.int().flatten()).view(unit.shape)


@lru_cache(maxsize=32)
def _codes(bits: int, device: torch.device) -> Tensor:
    """The code of every cell `(_CELLS,)` uint8."""
    with torch.inference_mode(False):
        middles = (torch.arange(_CELLS) + 0.5 - _CELLS // 2) / _CELLS_PER_UNIT
        known = levels(bits)
        return torch.bucketize(middles, (known[1:] + known[:-1]) / 2).to(torch.uint8).to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _table(bits: int, device: torch.device) -> Tensor:
    """The table of symbols in which every code stands for its level."""
    with torch.inference_mode(False):
        return symbol_table(levels(bits), bits).to(device, non_blocking=True)
