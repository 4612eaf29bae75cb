"""The rotation that spreads a vector's outliers over all its elements, so that few bits are enough (QuaRot, arXiv 2404.00456).

A Hadamard matrix with its columns' signs flipped. The signs are the Rudin-Shapiro sequence's: the Hadamard transform of that
sequence is flat (it is a bent function in every even number of bits), so that a vector whose elements are alike, the worst for
the plain matrix, is spread best. A dimension that is no power of two is turned in blocks that are, the largest first.
"""

from functools import lru_cache

import torch
from torch import Tensor


def turn(vectors: Tensor) -> Tensor:
    """Rotate `(..., dim)`: lengths and products between vectors stay what they are. The dtype stays, the sums are float32."""
    return (vectors.float() @ rotation_matrix(vectors.shape[-1], vectors.device)).to(vectors.dtype)


def turn_back(vectors: Tensor) -> Tensor:
    """The inverse of `turn`."""
    return (vectors.float() @ rotation_matrix(vectors.shape[-1], vectors.device).mT).to(vectors.dtype)


@lru_cache(maxsize=64)
def rotation_matrix(dim: int, device: torch.device) -> Tensor:
    """The rotation `(dim, dim)` of row vectors, orthonormal. One product is faster than butterflies up to 256 at least."""
    # Made once and used in passes with gradients and without.
    with torch.inference_mode(False):
        matrix = torch.block_diag(*(_signed_hadamard(size) for size in _powers(dim)))
        return matrix.to(device, non_blocking=True)


def _powers(dim: int) -> list[int]:
    """The powers of two that add up to dim, the largest first."""
    return [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]


def _signed_hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    # Rudin-Shapiro: minus where the index has an odd number of neighbouring pairs of set bits.
    signs = [(-1.0) ** (index & index >> 1).bit_count() for index in range(size)]
    return torch.tensor(signs)[:, None] * matrix * size**-0.5
