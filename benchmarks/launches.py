"""Kernels launched and host syncs a layer, on pretended CUDA devices, a stock cache beside ours.

    python -m benchmarks.launches --tokens 2048

Counted, not timed: an operation of torch's that launches counts once, however many kernels CUDA makes of it. The model is
random and narrow, in bfloat16 (the calibration in float32), with the heads of SmolLM2-135M: counts do not depend on widths.
What a forward does once is shared out among the layers. Run from the repository's root: the devices are those of the tests.
"""

import click
import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from kvprofile import KVMerger
from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.measuring import measure
from kvprofile.models.load import LoadedModel
from kvprofile.runtime.settings import CHUNK
from kvprofile.samples import Sample
from tests.pretend_cuda import PretendCuda, on_cuda
from tests.unit.tiny_models import head, profile_values, random_model, tiny_text

POLICIES = ("value-attention", "gather-mended", "zsmerge", "attention", "snapkv-128")
LAYERS, KV_HEADS = 5, 3
Row = tuple[str, int, int]


def narrow_model() -> PreTrainedModel:
    return random_model(
        LlamaConfig(
            vocab_size=640,
            hidden_size=144,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=9,
            num_key_value_heads=KV_HEADS,
            head_dim=64,
            max_position_embeddings=1 << 17,
        )
    )


def planned(model: PreTrainedModel) -> dict:
    """Every head under a policy of its own, all of those that `--policy auto` chooses among in turn."""
    names = [
        [POLICIES[(layer * KV_HEADS + index) % len(POLICIES)] for index in range(KV_HEADS)] for layer in range(LAYERS)
    ]
    return profile_values(model, {layer: [head(name, share=0.5) for name in row] for layer, row in enumerate(names)})


@torch.no_grad()
def generation(gpu: PretendCuda, tokens: int, batch: int, merged: bool) -> list[Row]:
    """What the prompt, a decode step and, where there is one, the step that merges cost."""
    model = on_cuda(narrow_model().to(torch.bfloat16))
    merger = KVMerger.from_profile(planned(model)).attach(model)
    cache = merger.cache() if merged else DynamicCache(config=model.config)
    text = tiny_text(tokens + CHUNK + 2, batch=batch).to("cuda")
    padding = torch.tensor([40 * row for row in range(batch)])
    mask = (torch.arange(text.shape[1]) >= padding[:, None]).to("cuda")
    counts: list[Row] = []
    for low, high in [(0, tokens), *((place, place + 1) for place in range(tokens, text.shape[1]))]:
        gpu.forget()
        model(text[:, low:high], attention_mask=mask[:, :high], past_key_values=cache, logits_to_keep=1)
        counts.append(("", gpu.launches.total(), gpu.syncs.total()))
    steps = sorted(counts[1:], key=lambda count: count[1])
    found = [(f"prefill of {tokens:,}", *counts[0][1:]), ("decode step", *steps[len(steps) // 2][1:])]
    return [*found, ("merge step", *steps[-1][1:])] if merged else found


def calibration(gpu: PretendCuda, tokens: int) -> list[Row]:
    """What measuring one sample costs."""
    model = on_cuda(narrow_model().requires_grad_(False))
    text = tiny_text(tokens + 256)[0]
    sample = Sample(name="text", kind="text", context=text[:tokens], continuation=text[tokens:])
    gpu.forget()
    measure(LoadedModel(model, None, "narrow", "made in memory", None), [sample], "gauss", candidates=CANDIDATES)
    return [(f"calibration sample of {tokens:,}", gpu.launches.total(), gpu.syncs.total())]


@click.command()
@click.option("--tokens", default=2048, show_default=True, help="Tokens of the prompt and of the sample.")
@click.option("--calibration/--no-calibration", "calibrates", default=True, show_default=True)
def main(tokens: int, calibrates: bool) -> None:
    """Print the table."""
    print(f"| a layer, of {LAYERS} | launches | host syncs |\n|---|---|---|")
    with PretendCuda() as gpu:
        for batch in (1, 2):
            kind = "" if batch == 1 else ", two rows, one padded"
            for name, merged in (("stock", False), ("merged", True)):
                show(generation(gpu, tokens, batch, merged), f"{name}{kind}")
        if calibrates:
            show(calibration(gpu, tokens), "measured")


def show(rows: list[Row], kind: str) -> None:
    for what, launches, syncs in rows:
        print(f"| {what}, {kind} | {launches / LAYERS:.1f} | {syncs / LAYERS:.1f} |", flush=True)


if __name__ == "__main__":
    main()
