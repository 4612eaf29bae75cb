"""Vectors as they are, or in 16 bits: nothing is taken off and nothing turned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Vectors in `dtype`, or in their own if that is None; a mean would change nothing and is left alone.

    float16 makes numbers beyond 65,504 infinite; bfloat16 keeps them.
    """

    name: str
    dtype: torch.dtype | None
    rotated: bool = False

    def nbytes(self, dim: int) -> int:
        """Two bytes an element; in their own dtype that is the count for a 16-bit model."""
        return 2 * dim

    def encode(self, vectors: Tensor, mean: Tensor | None = None) -> tuple[Tensor, ...]:
        """One part: the vectors."""
        return (vectors if self.dtype is None else vectors.to(self.dtype),)

    def decode(self, parts: Sequence[Tensor], dim: int, mean: Tensor | None = None) -> Tensor:
        """The vectors in float32; they are the part itself if that is float32."""
        return parts[0].float()
