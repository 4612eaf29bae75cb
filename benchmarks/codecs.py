"""Every codec on vectors like keys: bytes, error, and how fast it is written and read.

    OMP_NUM_THREADS=1 python benchmarks/codecs.py [--dim 64] [--vectors 6144]

Vectors are Gaussian with two channels far off, as many heads' keys have them, and the offline mean of those taken off or not.
The error is the mean length of what is lost over the vector's length. Speeds are the best of several rounds in GB/s of the
same vectors in 16 bits, so that they compare with reading the stock cache. Nothing is written.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS


def speed(count: int, repeats: int, work: Callable[[], object]) -> float:
    """GB/s of so many 16-bit elements."""
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return 2e-9 * count / best


def lost(name: str, vectors: Tensor, mean: Tensor | None) -> float:
    codec = CODECS[name]
    found = codec.decode(codec.encode(vectors, mean), vectors.shape[-1], mean)
    found = turn_back(found) if codec.rotated else found
    return float(((found - vectors).norm(dim=-1) / vectors.norm(dim=-1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--vectors", type=int, default=6144, help="2,048 tokens of three heads")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(arguments.dim)
    mean[arguments.dim // 3], mean[-2] = 8, -5
    vectors = mean + torch.randn(arguments.vectors, arguments.dim, generator=generator)
    print("| codec | bytes a vector | of 16 bits | error | centred | encode GB/s | decode GB/s |\n" + "|---" * 7 + "|")
    with torch.inference_mode():
        for name, codec in CODECS.items():
            parts = codec.encode(vectors)
            size = codec.nbytes(arguments.dim)
            errors = [f"{lost(name, vectors, own):.4f}" for own in (None, mean)]
            writing = speed(vectors.numel(), arguments.repeats, lambda codec=codec: codec.encode(vectors))
            reading = speed(
                vectors.numel(), arguments.repeats, lambda codec=codec, parts=parts: codec.decode(parts, arguments.dim)
            )
            speeds = [f"{value:.1f}" if codec.name != "none" else "-" for value in (writing, reading)]
            print(f"| {name} | {size} | {size / 2 / arguments.dim:.1%} | " + " | ".join([*errors, *speeds]) + " |")


if __name__ == "__main__":
    main()
