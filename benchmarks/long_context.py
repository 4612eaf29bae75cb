"""Prefill, peak memory and steps on long contexts, merged beside stock, on two layers of real head size.

    OMP_NUM_THREADS=1 python benchmarks/long_context.py                      # 2k to 32k tokens, about an hour
    OMP_NUM_THREADS=1 python benchmarks/long_context.py --lengths 8192 --repeats 3

The model has random weights: two layers of eight heads of 128 on two KV heads (`--kv-heads`). Every head keeps half its slots
(`--budget`); layers take the policies of `--policies` in turn: by default half the heads are `gather-mended`, which seeks the
most similar survivor. Stock is transformers' DynamicCache with SDPA. A prompt is read whole, and in pieces of
2,048 tokens. Stock and merged runs alternate in one process and every ratio is taken within its round; medians of the process'
CPU time are printed, because other work on the machine changes it least. A merge step is one in which aged tokens become
slots, once in 32. Peak memory is the largest resident memory of the prefill above what it was before, each in a fresh process
whose allocator gives freed memory back at once.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shared.memory import RETURNING, resident
from shared.tables import table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvprofile.merging.policies import POLICIES
from kvprofile.profile.fingerprint import model_facts
from kvprofile.profile.unmeasured import unmeasured_values
from kvprofile.runtime.merger import KVMerger

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 8, 128, 512
PIECE = 2048
STEPS = 64  # two merges among them


class Bench:
    """The model, and a merger attached to it; stock attention is still at hand."""

    def __init__(self, kv_heads: int, policies: list[str], budget: float, dtype: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HEADS * HEAD_DIM,
            intermediate_size=2 * HEADS * HEAD_DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=1 << 17,
            rope_theta=500_000.0,
        )
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False).to(getattr(torch, dtype))
        self.stock = self.model.config._attn_implementation
        names = [policies[layer % len(policies)] for layer in range(LAYERS)]
        heads = {
            layer: [{"policy": name, "epsilon": None, "share": budget}] * kv_heads for layer, name in enumerate(names)
        }
        plan = unmeasured_values(
            "random", model_facts(config), {name: POLICIES[name].to_dict() for name in names}, heads
        )
        self.merger = KVMerger.from_profile(plan).attach(self.model)
        self.ours = self.model.config._attn_implementation

    def cache(self, name: str) -> Any:
        """An empty cache: `stock` or `merged`; the model reads with the attention that goes with it from now on."""
        self.model.set_attn_implementation(self.ours if name == "merged" else self.stock)
        return self.merger.cache() if name == "merged" else DynamicCache(config=self.model.config)

    def read(self, cache: Any, tokens: Tensor, piece: int) -> float:
        """Read the tokens in pieces; CPU seconds."""
        begun = time.process_time()
        for part in tokens.split(piece, dim=1):
            self.model(part, past_key_values=cache, logits_to_keep=1)
        return time.process_time() - begun

    def steps(self, cache: Any) -> tuple[list[float], list[float]]:
        """CPU seconds of every decode step: those that merge nothing, and those that do."""
        plain, merging = [], []
        for _ in range(STEPS):
            merged = slots_merged(cache)
            seconds = self.read(cache, torch.ones(1, 1, dtype=torch.long), 1)
            (merging if slots_merged(cache) > merged else plain).append(seconds)
        return plain, merging


def slots_merged(cache: Any) -> int:
    """Slots of the first layer that are no longer in its tail; none of a stock cache."""
    return 0 if isinstance(cache, DynamicCache) else sum(cache.layers[0].state.merged_lengths())


def prompt(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def timings(bench: Bench, length: int, repeats: int) -> dict[str, Any]:
    """Prefill whole and in pieces, and steps, of stock and merged in turn."""
    rounds: list[dict[str, Any]] = []
    for _ in range(repeats):
        rounds.append({})
        for name in ("stock", "merged"):
            cache = bench.cache(name)
            whole = bench.read(cache, prompt(length), length)
            plain, merging = bench.steps(cache)
            size = cache.nbytes() if name == "merged" else None
            del cache
            pieces = bench.read(bench.cache(name), prompt(length), PIECE) if length > PIECE else None
            rounds[-1][name] = {"whole": whole, "pieces": pieces, "step": median(plain), "bytes": size}
            if merging:
                rounds[-1][name]["merge"] = median(merging)
    row: dict[str, Any] = {}
    for what in ("whole", "pieces", "step"):
        if rounds[0]["stock"][what] is not None:
            row[f"{what}_seconds"] = median(one["stock"][what] for one in rounds)
            row[what] = median(one["merged"][what] / one["stock"][what] for one in rounds)
    row["merge"] = median(one["merged"]["merge"] / one["stock"]["step"] for one in rounds)
    full = 2 * LAYERS * bench.model.config.num_key_value_heads * HEAD_DIM * bench.model.dtype.itemsize
    row["bytes"] = rounds[0]["merged"]["bytes"] / (full * (length + STEPS))
    return row


def peak(name: str, length: int, piece: int) -> int:
    """Bytes of resident memory a prefill needs at its peak, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", name, str(length), str(piece)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | RETURNING)
    return int(done.stdout)


def measure_peak(bench: Bench, name: str, length: int, piece: int) -> int:
    bench.read(bench.cache(name), prompt(128), 64)
    cache, tokens = bench.cache(name), prompt(length)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is what it is now
    before = resident("VmRSS")
    bench.read(cache, tokens, piece)
    return resident("VmHWM") - before


def peaks(length: int) -> dict[str, Any]:
    """Peak memory of every prefill, whole and in pieces, over stock's."""
    row: dict[str, Any] = {}
    for what, piece in {"whole": length, "pieces": PIECE}.items():
        if what == "whole" or length > PIECE:
            stock, merged = (peak(name, length, piece) for name in ("stock", "merged"))
            row |= {f"{what}_peak_mib": stock / 2**20, f"{what}_peak": merged / stock}
    return row


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    options.add_argument("--policies", nargs="+", default=["gather-mended", "zsmerge"])
    options.add_argument("--kv-heads", type=int, default=2)
    options.add_argument("--budget", type=float, default=0.5)
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=3, help="rounds up to 8,192 tokens; one beyond")
    options.add_argument("--only", choices=("timings", "peaks"), help="leave the other out")
    options.add_argument("-o", "--output", type=Path, default=Path("long-context.json"))
    options.add_argument("--peak", nargs=3, metavar=("CACHE", "LENGTH", "PIECE"), help=argparse.SUPPRESS)
    return options


def main() -> None:
    arguments = parser().parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.kv_heads, arguments.policies, arguments.budget, arguments.dtype)
    if arguments.peak:
        name, length, piece = arguments.peak
        print(measure_peak(bench, name, int(length), int(piece)))
        return
    bench.read(bench.cache("merged"), prompt(256), 128)
    rows = []
    for length in arguments.lengths:
        row: dict[str, Any] = {"what": "long", "length": length}
        if arguments.only != "peaks":
            row |= timings(bench, length, arguments.repeats if length <= 8192 else 1)
        if arguments.only != "timings":
            row |= peaks(length)
        rows.append(row)
        arguments.output.write_text(json.dumps(rows, indent=1))
        print(json.dumps(row), file=sys.stderr, flush=True)
    columns = {
        "stock prefill s": "whole_seconds",
        "prefill": "whole",
        "stock in pieces s": "pieces_seconds",
        "in pieces": "pieces",
        "stock peak MiB": "whole_peak_mib",
        "peak": "whole_peak",
        "stock peak in pieces MiB": "pieces_peak_mib",
        "peak in pieces": "pieces_peak",
        "stock step s": "step_seconds",
        "step": "step",
        "merge step": "merge",
        "cache bytes": "bytes",
    }
    shown = {title: key for title, key in columns.items() if any(key in row for row in rows)}
    digits = {
        key: ".0f" if key.endswith("mib") else ".4f" if key == "step_seconds" else ".2f" for key in shown.values()
    }
    cells = [{key: format(row[key], digits[key]) if key in row else "-" for key in shown.values()} for row in rows]
    table(
        [row | {"length": f"{row['length']:,}"} | cell for row, cell in zip(rows, cells, strict=True)],
        "long",
        {"tokens": "{length}"} | {title: f"{{{key}}}" for title, key in shown.items()},
    )


if __name__ == "__main__":
    main()
