"""Prefill, decode and memory of a merged cache beside the stock one, as ratios within one run.

    python benchmarks/runtime.py                              # SmolLM2-135M and Gemma 3 270M, about ten minutes on two cores
    python benchmarks/runtime.py --models smollm2-135m --lengths 4096 --batches 1 --repeats 1
    python benchmarks/runtime.py --models smollm2-135m --backends compiled blockwise      # side by side in every round

Stock is transformers' DynamicCache with SDPA. Stock and merged runs alternate and every ratio is taken within its round; the
medians are printed, wall and CPU time. A decode figure covers 32 steps, one merge of aged tokens among them. `limit` is the
ratio that a step without any attention cost would reach (the same model with one token of context). Live bytes are those of
all tensors that a prefill leaves behind, found by walking the garbage collector's objects, not by formula. Peak memory is the
largest resident memory during a prefill above what it was before, as Linux keeps it, in processes of their own whose allocator
gives freed memory back at once (or it would hide in what loading the model left), stock and merged in turn.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shared.memory import RETURNING, resident
from shared.tables import table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvprofile
from kvprofile.planning.plans import replan

PROFILES = Path(__file__).parent.parent / "profiles"
STEPS = 32  # a chunk: the runtime merges once in so many steps
LONG = 4096  # past this length: one prefill, batch 1, the first model, budgets that merge; to keep the run short


class Bench:
    """A model with a merger attached for every budget and back end, its stock attention still at hand."""

    def __init__(self, name: str, budgets: list[float], codec: str, backends: list[str | None]) -> None:
        loaded = kvprofile.load_model(name)
        path = PROFILES / f"{name}.json"
        profile = kvprofile.load_profile(path)
        arrays = kvprofile.load_arrays(profile, path)
        damage = arrays.get("damage_mean")
        self.model: PreTrainedModel = loaded.model
        self.stock = self.model.config._attn_implementation
        plans = {budget: replan(profile, damage, budget, measured=arrays, codec=codec) for budget in budgets}
        self.mergers = {
            (budget, backend): kvprofile.KVMerger.from_profile(plan, arrays=arrays, backend=backend).attach(self.model)
            for budget, plan in plans.items()
            for backend in backends
        }
        self.ours = self.model.config._attn_implementation
        self.names = ["stock", *self.mergers]
        text = "\n\n".join(document.text for document in kvprofile.load_documents("builtin"))
        self.ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]

    def tokens(self, length: int) -> Tensor:
        """The first tokens of the built-in text, over again where it is too short."""
        return self.ids.repeat(1, -(-length // self.ids.shape[1]))[:, :length]

    def cache(self, name: Any) -> Any:
        """An empty cache: `stock`, or that of a budget and a back end."""
        return self.mergers[name].cache() if name in self.mergers else DynamicCache(config=self.model.config)

    def read(self, name: Any, cache: Any, tokens: Tensor, steps: int = 1) -> dict[str, float]:
        """Read the same tokens `steps` times; seconds of a step, wall and CPU."""
        self.model.set_attn_implementation(self.ours if name in self.mergers else self.stock)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.model(tokens, past_key_values=cache, logits_to_keep=1)
        return {"wall": (time.perf_counter() - wall) / steps, "cpu": (time.process_time() - cpu) / steps}


def live_bytes(make: Callable[[], Any]) -> tuple[Any, int]:
    """What `make` returns, and the bytes of all tensor storages that live after it and did not before."""
    before = storages()
    made = make()
    after = storages()
    return made, sum(size for place, size in after.items() if place not in before)


def storages() -> dict[int, int]:
    """Size of every tensor storage alive, by its address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def ratios(rounds: list[dict[Any, dict[str, float]]], top: Any, bottom: Any) -> dict[str, float]:
    """Median of `top` over `bottom`, wall and CPU, over the rounds that have both."""
    both = [one for one in rounds if top in one and bottom in one]
    return {kind: median(one[top][kind] / one[bottom][kind] for one in both) for kind in ("wall", "cpu")}


def prefill(bench: Bench, length: int, repeats: int) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Prefill with every budget, alternating with stock; the caches of the last round stay."""
    tokens, rounds, rows = bench.tokens(length), [], []
    caches: dict[Any, Any] = {}
    live: dict[Any, int] = {}
    for index in range(repeats):
        rounds.append({})
        for name in bench.names:
            if name[0] == 1 and (index < repeats - 1 or length > LONG):
                continue  # nothing is merged: one prefill, for the decode steps

            def fill(name: Any = name, seconds: dict[Any, Any] = rounds[-1]) -> Any:
                cache = bench.cache(name)
                seconds[name] = bench.read(name, cache, tokens)
                return cache

            if index < repeats - 1:
                fill()
            else:
                caches[name], live[name] = live_bytes(fill)
    for name in [name for name in caches if name != "stock"]:
        rows.append(
            {
                "what": "prefill",
                "length": length,
                "budget": name[0],
                "backend": name[1] or "first able",
                "stock_seconds": median(one["stock"]["wall"] for one in rounds),
            }
            | ratios(rounds, name, "stock")
            | {"live_bytes": live[name] / live["stock"], "nbytes": caches[name].nbytes() / live["stock"]}
        )
    return rows, caches


def decode(bench: Bench, caches: dict[Any, Any], length: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Decode steps with every cache in turn."""
    tokens = bench.tokens(1).expand(batch, 1)
    empty = DynamicCache(config=bench.model.config)
    bench.read("limit", empty, tokens)
    runs = {"limit": empty, **caches}
    for name, cache in runs.items():
        bench.read(name, cache, tokens, 2)
    rounds = [{name: bench.read(name, cache, tokens, STEPS) for name, cache in runs.items()} for _ in range(repeats)]
    limit = ratios(rounds, "stock", "limit")
    return [
        {"what": "decode", "length": length, "batch": batch, "budget": name[0], "backend": name[1] or "first able"}
        | {
            "stock_seconds": median(one["stock"]["wall"] for one in rounds),
            "limit": limit["wall"],
            "cpu_limit": limit["cpu"],
        }
        | ratios(rounds, "stock", name)
        for name in caches
        if name != "stock"
    ]


def peak(name: str, cache: str, length: int, codec: str) -> int:
    """Bytes of resident memory a prefill needs at its peak, in a process of its own."""
    command = [sys.executable, __file__, "--codec", codec, "--peak", name, cache, str(length)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | RETURNING)
    return int(done.stdout)


def measure_peak(name: str, cache: str, length: int, codec: str) -> None:
    bench = Bench(name, [] if cache == "stock" else [float(cache)], codec, [None])
    own = bench.names[-1]
    bench.read(own, bench.cache(own), bench.tokens(16))
    gc.collect()
    for _ in range(10):
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is what it is now
        before = resident("VmRSS")
        if resident("VmHWM") < 1.01 * before:
            break
    else:
        sys.exit("the system does not forget the highest memory of this process, so a prefill's peak cannot be told")
    bench.read(own, bench.cache(own), bench.tokens(length))
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8000])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--codec", default="none", help="how slots are stored, as kvprofile plan --codec")
    parser.add_argument(
        "--backends", nargs="+", default=[None], help="by name, to compare them; else the first that is able"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("runtime.json"))
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "CACHE", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.peak:
        name, cache, length = arguments.peak
        measure_peak(name, cache, int(length), arguments.codec)
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        bench = Bench(name, arguments.budgets, arguments.codec, arguments.backends)
        for length in arguments.lengths:
            if length > LONG and name != arguments.models[0]:
                continue
            filled, caches = prefill(bench, length, arguments.repeats if length <= LONG else 1)
            rows += [{"model": name} | row for row in filled]
            grown = 1
            for batch in sorted(arguments.batches) if length <= LONG else [1]:
                for cache in caches.values():
                    cache.batch_repeat_interleave(batch // grown)
                grown = batch
                rows += [{"model": name} | row for row in decode(bench, caches, length, batch, arguments.repeats)]
                arguments.output.write_text(json.dumps(rows, indent=1))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            del caches
        del bench
        gc.collect()
        length = min(max(arguments.lengths), LONG)
        budgets = [str(budget) for budget in arguments.budgets if budget < 1]
        rounds = [
            {cache: peak(name, cache, length, arguments.codec) for cache in ("stock", *budgets)}
            for _ in range(arguments.repeats)
        ]
        stock = median(one["stock"] for one in rounds)
        for budget in budgets:
            row = {"model": name, "what": "peak", "length": length, "budget": float(budget), "stock_mib": stock / 2**20}
            rows.append(row | {"peak": median(one[budget] for one in rounds) / stock})
    arguments.output.write_text(json.dumps(rows, indent=1))
    place = {"model": "{model}", "tokens": "{length}", "budget": "{budget:g}"}
    served = place | {"back end": "{backend}"}
    figures = {"wall": "{wall:.2f}", "CPU": "{cpu:.2f}"}
    table(
        rows,
        "prefill",
        served
        | {"stock s": "{stock_seconds:.2f}"}
        | figures
        | {"live bytes": "{live_bytes:.3f}", "nbytes()": "{nbytes:.3f}"},
    )
    table(
        rows,
        "decode",
        served
        | {"batch": "{batch}", "stock s": "{stock_seconds:.3f}"}
        | {
            "speed-up, wall": "{wall:.2f}",
            "limit": "{limit:.2f}",
            "speed-up, CPU": "{cpu:.2f}",
            "CPU limit": "{cpu_limit:.2f}",
        },
    )
    table(rows, "peak", place | {"stock MiB": "{stock_mib:.0f}", "peak over stock": "{peak:.2f}"})


if __name__ == "__main__":
    main()
