"""What a calibration will cost, told from the model's configuration alone: tokens, time, memory.

The weights' shapes come from a model on torch's meta device, which holds no numbers. Time is counted in multiply-adds and
turned into seconds by a short matrix product on the device; memory is the sum of what is alive at once. Both are rough: a
factor of two either way is usual on a busy machine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvprofile.fingerprint import model_facts
from kvprofile.measure.damage import BUDGETS
from kvprofile.merging.policies import POLICIES
from kvprofile.probes import ProbeMix
from kvprofile.sensitivity import DRAWS

QUESTION_TOKENS = 24  # of a planted fact or look-up, about
LIBRARIES = 700 * 2**20  # bytes of a Python process with torch and transformers loaded

# How many times longer a multiply-add takes than in a large matrix product: a prefill is mostly large products, damage
# curves are many small ones with exponentials between them. Fitted to `benchmarks/calibrate.py` on SmolLM2-135M.
PREFILL_SLOWDOWN = 1.3
DAMAGE_SLOWDOWN = 11.0
CHECK_READINGS = 3.5  # full cache, plan and uniform plan on every held-out sample, with their merging


@dataclass(frozen=True)
class Estimate:
    """Tokens to read, seconds, and bytes alive at once by what they are for; `cache` is one sample's full KV cache."""

    parameters: int
    tokens: int
    device: str
    dtype: str
    measure_seconds: float
    check_seconds: float
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """Of the whole run, without loading the model."""
        return self.measure_seconds + self.check_seconds


def estimate(
    config: Any,
    *,
    samples: int,
    held_out: int,
    tokens: int,
    candidates: Sequence[str],
    mix: ProbeMix | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Estimate:
    """Estimate a calibration of a model with this transformers configuration; no weights are read.

    Raises UsageError for a device or dtype that cannot be used.
    """
    from kvprofile.models import choose_placement

    target, weight_dtype, _ = choose_placement(device, dtype, None)
    assert target is not None  # no device map was given
    facts = model_facts(config)
    layers, kv_heads, heads, dim = (facts[name] for name in ("layers", "kv_heads", "query_heads", "head_dim"))
    merged = facts["attention"].count("full_attention")
    body, vocabulary, total = _parameters(config)
    item = weight_dtype.itemsize
    mix = mix or ProbeMix()
    planted = QUESTION_TOKENS * (mix.facts + mix.lookups)
    probe = mix.passages * mix.passage_tokens + mix.continuation_tokens + planted
    rows = probe * heads

    prefill = tokens * body + 2 * tokens**2 * heads * dim * layers
    answers = probe * (body + vocabulary * config.get_text_config(decoder=True).hidden_size)
    gradients = (1 + DRAWS) * answers if candidates else 0
    slots = tokens * sum(BUDGETS)  # over all the budgets a policy is measured at
    damage = sum(merged * rows * dim * (tokens if POLICIES[name].only_drops else 2 * slots) for name in candidates)
    rate = _rate(target, weight_dtype)
    read_seconds, check_seconds = (PREFILL_SLOWDOWN * (prefill + more) / rate for more in (gradients, answers))
    memory = {
        "weights": total * item,
        "cache": 2 * layers * kv_heads * dim * tokens * item,
        "statistics": 8 * layers * kv_heads * (tokens + 1600 + 1024 + 3000),
        "libraries": LIBRARIES,
    }
    if candidates:
        # Probability tables of the probe's answers in float32, the probe's attention over one layer's context, its graph.
        tables = 4 * probe * vocabulary * 4
        weights = 4 * rows * tokens * 4
        graph = probe * body // max(1, config.get_text_config(decoder=True).hidden_size) * item * 2
        memory["probe"] = tables + weights + graph
    return Estimate(
        parameters=total,
        tokens=(samples + held_out) * tokens,
        device=str(target),
        dtype=str(weight_dtype).removeprefix("torch."),
        measure_seconds=samples * (read_seconds + DAMAGE_SLOWDOWN * damage / rate),
        check_seconds=held_out * CHECK_READINGS * check_seconds,
        memory=memory,
    )


def _parameters(config: Any) -> tuple[int, int, int]:
    """Parameters a token passes through without embeddings, size of the vocabulary, parameters in all."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    text = config.get_text_config(decoder=True)
    return total - sum(weight.numel() for weight in tables.values()), text.vocab_size, total


def _rate(device: Any, dtype: Any, size: int = 1024) -> float:
    """Multiply-adds a second of a square matrix product, the best of a few."""
    import torch

    factor = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (factor @ factor).sum().item()  # item() waits for the device
        best = min(best, time.perf_counter() - started)
    return size**3 / best
