"""Attention of one decode step over a long context, by each back end, beside stock SDPA and FlashAttention.

    python benchmarks/decode_kernel.py                      # on a GPU: 4k to 128k tokens, batch 1 to 16, about ten minutes
    python benchmarks/decode_kernel.py --lengths 8192 --batches 1 4
    TRITON_INTERPRET=1 python benchmarks/decode_kernel.py --device cpu --lengths 256 --batches 1 --repeats 1     # does it run?

One layer of Llama 3's shape, 32 heads of 128 on 8 KV heads, in bfloat16. Stock attends to all tokens; ours to half of them
(--budget), a different number in every head, with a tail of 64 and biases, as they are and packed. Microseconds a step, medians
of rounds in which all take their turns, and what was read a second. On a GPU by CUDA events, a buffer larger than its cache
written in between; captured as a graph where that works, so that what Python costs is left out (--no-graph leaves it in).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from shared.tables import table
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvprofile.errors import KVProfileError
from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends import triton_decode
from kvprofile.runtime.backends.contract import Facts, always
from kvprofile.runtime.backends.table import BACKENDS
from kvprofile.runtime.block_size import block_size
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.shelf import Shelf, empty_shelf

HEADS, KV_HEADS, DIM, TAIL = 32, 8, 128, 64
CODECS = (("none", "none"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
FLUSHED = 1 << 28  # bytes written between two steps, more than any cache holds


def lengths_of(tokens: int, batch: int, budget: float) -> list[int]:
    """Slots of every row and head: a quarter of the budget to seven quarters of it, on average the budget."""
    shares = [0.25 + 1.5 * head / (KV_HEADS - 1) for head in range(KV_HEADS)] * batch
    return [max(1, min(tokens, round(budget * share * tokens)) - TAIL) for share in shares]


def shelf_of(lengths: list[int], tokens: int, codecs: tuple[str, str], backend: str, device: torch.device) -> Shelf:
    """Random slots; packed a row at a time. Raises KVProfileError where the back end cannot serve them."""
    dtype = torch.bfloat16
    facts = Facts(device, dtype, DIM, DIM, HEADS // KV_HEADS, False, codecs)
    mean = torch.zeros(KV_HEADS, DIM, device=device)
    empty = Slots(
        *(torch.zeros(0, DIM, device=device, dtype=dtype) for _ in range(2)), torch.zeros(0, device=device), []
    )
    shelf = empty_shelf(empty, facts, len(lengths), block_size(tokens), backend=backend, mean=mean, weighs=True)
    for first in range(0, len(lengths), KV_HEADS):
        own = lengths[first : first + KV_HEADS]
        keys, values = (torch.randn(sum(own), DIM, device=device, dtype=dtype) for _ in range(2))
        slots = Slots(keys, values, torch.rand(sum(own), device=device) * 3, own)
        shelf.add(slots, list(range(first, first + KV_HEADS)))
    return shelf


def ways(tokens: int, batch: int, budget: float, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every way to attend, and the bytes of keys and values it reads."""
    dtype = torch.bfloat16

    def drawn(heads: int, count: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, DIM, device=device, dtype=dtype)

    query, keys, values = drawn(HEADS, 1), drawn(KV_HEADS, tokens), drawn(KV_HEADS, tokens)

    def stock() -> Any:
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def flash() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return stock()

    found = {"stock SDPA": (stock, keys.nbytes + values.nbytes)}
    if device.type == "cuda":
        found["FlashAttention"] = (flash, keys.nbytes + values.nbytes)
    tail = [drawn(KV_HEADS, TAIL) for _ in range(2)]
    call = AttentionCall(None, query, *tail, None, {"scaling": DIM**-0.5})
    lengths = lengths_of(tokens, batch, budget)
    for backend in ("triton", "varlen", "blockwise"):
        for codecs in CODECS:
            try:
                shelf = shelf_of(lengths, tokens, codecs, backend, device)
            except KVProfileError:
                continue
            read = sum(part.nbytes for part in shelf.blocks.parts()) + 2 * tail[0].nbytes
            name = backend if codecs == CODECS[0] else f"{backend} {'/'.join(codecs)}"
            found[name] = (lambda shelf=shelf: ragged_attention(call, [shelf], mass=True)), read
    return found


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph; as it is where it cannot be captured."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step
    return graph.replay


def seconds(step: Callable[[], Any], device: torch.device, flush: torch.Tensor | None) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun
    assert flush is not None
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(tokens: int, batch: int, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    steps = ways(tokens, batch, arguments.budget, device)
    on_gpu = device.type == "cuda"
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if on_gpu else None
    ready = {name: captured(step) if on_gpu and arguments.graph else step for name, (step, _) in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in ready.values():
        step()  # compiles
    for _ in range(arguments.repeats):
        for name, step in ready.items():
            times[name].append(seconds(step, device, flush))
    whole = median(times["stock SDPA"])
    return [
        {
            "what": "decode",
            "tokens": tokens,
            "batch": batch,
            "way": name,
            "us": median(own) * 1e6,
            "speed": whole / median(own),
            "gbps": steps[name][1] / median(own) / 1e9,
            "graph": ready[name] is not steps[name][0],
        }
        for name, own in times.items()
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    options.add_argument("--budget", type=float, default=0.5)
    options.add_argument("--repeats", type=int, default=50)
    options.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("-o", "--output", type=Path, default=Path("decode-kernel.json"))
    arguments = options.parse_args()
    device, rows = torch.device(arguments.device), []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    with torch.inference_mode(), on_the_processor(interpreted):
        for tokens in arguments.lengths:
            for batch in arguments.batches:
                rows += measure(tokens, batch, arguments, device)
                arguments.output.write_text(json.dumps(rows, indent=1))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, kernels interpreted: no speed"
    print(f"{name}, torch {torch.__version__}")
    titles = {"tokens": "{tokens:,}", "batch": "{batch}", "way": "{way}", "µs": "{us:.1f}"}
    table(rows, "decode", titles | {"x stock": "{speed:.2f}", "GB/s": "{gbps:.0f}", "graph": "{graph}"})


def on_the_processor(interpreted: bool) -> Any:
    """Lets the kernels serve the CPU, by Triton's interpreter."""
    patches = ExitStack()
    if interpreted:
        patches.enter_context(mock.patch.dict(BACKENDS, triton=replace(BACKENDS["triton"], unable=always)))
        patches.enter_context(mock.patch.object(triton_decode, "_multiprocessors", return_value=4))
    return patches


if __name__ == "__main__":
    main()
