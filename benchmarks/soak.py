"""A merged cache for a long time: steps without end, many conversations, several threads; memory, budget and step time.

    python benchmarks/soak.py                                             # 20,000 steps, 200 conversations, 8 threads
    python benchmarks/soak.py --steps 2000 --conversations 20 --threads 2

A tiny random model (two layers, two KV heads) decodes `--steps` tokens on one cache, holds conversations of four turns, each
on a cache of its own, one after the other, and does the same in threads that share the model. Printed: the most slots above
the budget (the slack allows 34: 32 waiting tokens and 2 for rounding), memory, resident and of live tensors, and the CPU time
of a step in every tenth of the run, which grows with the slots as the budget does and with nothing else. Exit code 1 if a
budget was missed, a thread's text differs from the same text alone, or live tensors grew.
"""

import argparse
import gc
import os
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvprofile import KVMerger
from kvprofile.merging.policies import POLICIES
from kvprofile.profile.fingerprint import model_facts
from kvprofile.runtime.settings import LayerSetting, Settings

VOCAB, SHARES, SLACK = 512, (0.05, 0.5), 34
PROTECTED = 36


def build() -> tuple[PreTrainedModel, Settings]:
    """A random model, and settings with a head that merges and one that drops."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    setting = LayerSetting(
        ((POLICIES["absorb"], (0,)), (POLICIES["h2o"], (1,))),
        torch.full((2,), torch.inf),
        torch.tensor(SHARES, dtype=torch.float64),
        exact=True,
    )
    return model, Settings("soak", model_facts(model.config), {0: setting, 1: setting})


def excess(cache: Any) -> float:
    """The most slots that any head holds above its share, or above the protected tokens where those are more."""
    seen = cache.get_seq_length()
    return max(
        slots - max(share * seen, PROTECTED)
        for layer in cache.slots()
        for row in layer
        for slots, share in zip(row, SHARES, strict=True)
    )


def resident() -> float:
    """Resident memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def live() -> int:
    """Bytes of all tensors alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@torch.no_grad()
def steps(model: PreTrainedModel, merger: KVMerger, number: int) -> float:
    """Decode on one cache; print a line for every tenth. Returns the largest excess."""
    cache, token = merger.cache(), torch.tensor([[1]])
    model(torch.randint(1, VOCAB, (1, 256)), past_key_values=cache)
    most, started = 0.0, time.process_time()
    print("| tokens seen | slots, most | cache MB | resident MB | CPU ms a step |\n|---|---|---|---|---|")
    for step in range(1, number + 1):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        most = max(most, excess(cache))
        if step % max(1, number // 10) == 0:
            each = (time.process_time() - started) / max(1, number // 10) * 1e3
            slots = max(cache.slots()[0][0])
            print(
                f"| {cache.get_seq_length():,} | {slots:,} | {cache.nbytes() / 1e6:.2f} | {resident():.0f} | {each:.2f} |",
                flush=True,
            )
            started = time.process_time()
    return most


def converse(model: PreTrainedModel, merger: KVMerger, seed: int) -> tuple[Tensor, float]:
    """Four turns on one cache, greedy; the whole text, and the largest excess after a turn."""
    draw = torch.Generator().manual_seed(seed)
    cache, text, most = merger.cache(), torch.zeros(1, 0, dtype=torch.long), 0.0
    for _ in range(4):
        asked = torch.randint(1, VOCAB, (1, int(torch.randint(20, 120, (1,), generator=draw))), generator=draw)
        text = torch.cat([text, asked], dim=1)
        mask = torch.ones_like(text)
        text = model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False)
        most = max(most, excess(cache))
    return text, most


def in_threads(model: PreTrainedModel, merger: KVMerger, threads: int, each: int) -> tuple[int, float]:
    """The same conversations in threads that share the model; how many came out otherwise, and the largest excess."""
    alone = [converse(model, merger, seed)[0] for seed in range(threads * each)]
    found: list[tuple[Tensor, float] | None] = [None] * len(alone)

    def work(first: int) -> None:
        for seed in range(first, len(alone), threads):
            found[seed] = converse(model, merger, seed)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    differing = sum(
        one is None or not torch.equal(one[0], expected) for one, expected in zip(found, alone, strict=True)
    )
    return differing, max((one[1] for one in found if one is not None), default=0.0)


def main() -> int:
    """Run all three and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    model, settings = build()
    merger = KVMerger(settings).attach(model)
    converse(model, merger, 0)  # whatever is made at first use exists from here on
    before = live()
    over = [steps(model, merger, arguments.steps)]
    print(f"\n{arguments.steps:,} steps: at most {over[0]:.1f} slots above the budget; live {live() - before:+,} bytes")
    memory = []
    for seed in range(arguments.conversations):
        over.append(converse(model, merger, seed)[1])
        if seed in (arguments.conversations // 10, arguments.conversations - 1):
            memory.append(resident())
    print(
        f"{arguments.conversations} conversations: at most {max(over[1:]):.1f} slots above; "
        f"resident {memory[0]:.0f} MB after a tenth, {memory[-1]:.0f} MB at the end; live {live() - before:+,} bytes"
    )
    differing, most = in_threads(model, merger, arguments.threads, max(1, arguments.conversations // 20))
    grown = live() - before
    print(
        f"{arguments.threads} threads: {differing} texts differ from the same alone; at most {most:.1f} slots above; "
        f"live {grown:+,} bytes"
    )
    return int(max(*over, most) > SLACK or differing > 0 or grown > 0)


if __name__ == "__main__":
    sys.exit(main())
