"""What it costs to put new slots behind those that are stored, as a text grows: flat, or growing with it?

    OMP_NUM_THREADS=1 python benchmarks/appending.py
    PYTHONPATH=OTHER/TREE OMP_NUM_THREADS=1 python benchmarks/appending.py     # the same of another version, in turn

One layer's shelf of eight KV heads of 128, as merge steps of 32 tokens at half the slots fill it: 16 slots a head. The prompt's
slots come at once; then as many merges as give every head 2,048 slots more. Printed are the time a slot of one head takes, on
average over all merges, moves included; the median; and the slowest, in which all are moved. Wall-clock time of `Shelf.add`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from kvprofile.merging.slots import Slots
from kvprofile.runtime.backends.contract import Facts
from kvprofile.runtime.block_size import block_size
from kvprofile.runtime.shelf import empty_shelf

HEADS, DIM, CHUNK, MORE = 8, 128, 16, 2048


def slots(each: int, dtype: torch.dtype) -> Slots:
    """`each` slots of every head."""
    keys, values = (torch.randn(HEADS * each, DIM).to(dtype) for _ in range(2))
    return Slots(keys, values, torch.rand(HEADS * each), [each] * HEADS)


def measure(held: int, codecs: tuple[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds a slot, and the bytes stored over those of as many slots without room."""
    facts = Facts(torch.device("cpu"), dtype, DIM, DIM, 4, False, codecs)
    first, more = slots(held, dtype), slots(CHUNK, dtype)
    size, rows = block_size(2 * held), list(range(HEADS))
    shelf, exact = (empty_shelf(first, facts, HEADS, size, backend=None, mean=None, weighs=True) for _ in range(2))
    shelf.add(first, rows)
    seconds = []
    for _ in range(MORE // CHUNK):
        begun = time.perf_counter()
        shelf.add(more, rows)
        seconds.append(time.perf_counter() - begun)
    exact.add(slots(held + MORE, dtype), rows)
    stored, least = (sum(part.nbytes for part in one.blocks.tensors()) for one in (shelf, exact))
    each = CHUNK * HEADS / 1e6
    return {
        "what": "appending",
        "codecs": "/".join(codecs),
        "slots": held,
        "mean_us": mean(seconds) / each,
        "median_us": median(seconds) / each,
        "slowest_us": max(seconds) / each,
        "bytes": stored / least,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--slots", type=int, nargs="+", default=[4096, 16384, 32768], help="of every head at first")
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("-o", "--output", type=Path, default=Path("appending.json"))
    arguments = options.parse_args()
    torch.set_num_threads(1)
    dtype, rows = getattr(torch, arguments.dtype), []
    print("| codecs | slots a head | mean µs a slot | median | slowest | bytes over exact |\n|---|---|---|---|---|---|")
    for codecs in (("none", "none"), ("int8", "int4")):
        for held in arguments.slots:
            found = [measure(held, codecs, dtype) for _ in range(arguments.repeats)]
            row = found[0] | {name: median(one[name] for one in found) for name in found[0] if name.endswith("us")}
            rows.append(row)
            print(
                "| {codecs} | {slots:,} | {mean_us:.2f} | {median_us:.2f} | {slowest_us:.1f} | {bytes:.3f} |".format(
                    **row
                ),
                flush=True,
            )
    arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
