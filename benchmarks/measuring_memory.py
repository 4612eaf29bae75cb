"""Peak memory of measuring one sample, and what the probe's graph keeps, on two layers of real head size.

    OMP_NUM_THREADS=1 python benchmarks/measuring_memory.py                    # 2,048 to 16,384 tokens
    OMP_NUM_THREADS=1 python benchmarks/measuring_memory.py --lengths 32768 --dtype float32

The model has random weights: two layers of 32 heads of 128 on eight KV heads (an 8B Llama's attention) and a small MLP. Every
length is measured in a fresh process whose allocator gives freed memory back at once; memory is the largest resident memory
above what the loaded model took. The graph is what autograd keeps for the backward, every storage once.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from shared.memory import RETURNING, resident
from shared.tables import table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvprofile.calibration.measuring import measure
from kvprofile.calibration.observe import Observer
from kvprofile.models.load import LoadedModel
from kvprofile.samples import Sample

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 32, 8, 128, 512


def build(dtype: str) -> LlamaForCausalLM:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1 << 17,
        dtype=getattr(torch, dtype),
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(getattr(torch, dtype))


def measured(tokens: int, dtype: str, policies: tuple[str, ...]) -> dict[str, float]:
    """MiB above the loaded model: the peak, the keys and values of the context, the probe's graph."""
    model = build(dtype)
    text = torch.randint(VOCABULARY, (tokens + 64,), generator=torch.Generator().manual_seed(1))
    loaded = LoadedModel(model, None, "two layers", "random weights", None)  # type: ignore[arg-type]
    weights = {weight.untyped_storage().data_ptr() for weight in model.state_dict().values()}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    reading = Observer.read

    def hooked(*arguments: object, **options: object) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            return reading(*arguments, **options)  # type: ignore[arg-type]

    Observer.read = hooked  # type: ignore[method-assign,assignment]
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is what it is now
    before = resident("VmRSS")
    measure(loaded, [Sample(text[:tokens], text[tokens:], "noise", "noise")], "gauss", candidates=policies)
    context = LAYERS * 2 * KV_HEADS * HEAD_DIM * tokens * getattr(torch, dtype).itemsize
    return {
        "peak": (resident("VmHWM") - before) / 2**20,
        "context": context / 2**20,
        "graph": sum(kept.values()) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", nargs="*", default=["value-attention", "attention"])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.dtype, tuple(arguments.policies))))
        return
    rows = []
    for length in arguments.lengths:
        command = [sys.executable, __file__, "--one", str(length), "--dtype", arguments.dtype]
        command += ["--policies", *arguments.policies]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | RETURNING)
        rows.append({"what": "memory", "tokens": length, **json.loads(done.stdout)})
    columns = {
        "tokens": "{tokens:,}",
        "context's keys and values, MiB": "{context:.0f}",
        "the probe's graph, MiB": "{graph:.0f}",
        "peak, MiB": "{peak:.0f}",
    }
    table(rows, "memory", columns)


if __name__ == "__main__":
    main()
