"""A calibration and generations of tiny random models on a device."""

from typing import Any

import torch

from kvprofile.doctor.selftest.attention import TOLERANCE
from kvprofile.errors import KVProfileError
from kvprofile.models.load import LoadedModel
from kvprofile.runtime.backends.table import explained
from kvprofile.runtime.layer import MergedLayer

CONTEXT = 256  # tokens of a sample: enough that half of them can go
NEW_TOKENS = 40  # enough that some of them age and are compressed too
VOCABULARY = 512


def configurations() -> dict[str, Any]:
    """Two models: Llama's plain layers with four query heads a KV head; Gemma 2's, of which every other has a window."""
    from transformers import Gemma2Config, LlamaConfig

    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    window = {"sliding_window": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 30.0}
    return {"a tiny Llama": LlamaConfig(**size), "a tiny Gemma 2": Gemma2Config(**size, **window)}


def check_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, bool, dict[str, str]]:
    """Calibrate a tiny model and generate with the profile, a padded batch: a profile's whole path on this device.

    Returns how it went in a clause, whether well, and the back end of every layer. Raises whatever goes wrong.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    from kvprofile.calibration.calibrate import calibrate
    from kvprofile.runtime.merger import KVMerger

    config = configurations()[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype).eval().requires_grad_(False)
    loaded = LoadedModel(model, None, "self-test", "made in memory", None)
    profile, _ = calibrate(loaded, _samples(), budget=0.5, warn=lambda _message: None)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, VOCABULARY, (2, CONTEXT), generator=generator).to(device)
    mask = torch.ones_like(prompt)
    mask[1, :40] = 0
    merger = KVMerger.from_profile(profile)
    with torch.inference_mode():
        stock = model(prompt, attention_mask=mask, past_key_values=DynamicCache(config=config)).logits[:, -1]
        merger.attach(model)
        try:
            cache, generated = merger.cache(), merger.cache()
            ours = model(prompt, attention_mask=mask, past_key_values=cache).logits[:, -1]
            length = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            tokens = model.generate(prompt, attention_mask=mask, past_key_values=generated, **length)
        finally:
            merger.detach()
    if tokens.shape[1] != CONTEXT + NEW_TOKENS:
        raise KVProfileError(f"expected {NEW_TOKENS} new tokens, got {tokens.shape[1] - CONTEXT}")
    if generated.slots() == [] or min(slots for row in generated.slots()[0] for slots in row) >= CONTEXT:
        raise KVProfileError("nothing was merged")
    error = float((ours.float() - stock.float()).abs().max() / stock.float().abs().max())
    told = f"the prompt's logits are within {error:.1e} of the stock cache's"
    return told, error <= TOLERANCE[dtype], _backends(name, cache)


def _backends(name: str, cache: Any) -> dict[str, str]:
    """Which back end serves a step of every layer, by the layer in words."""
    told = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MergedLayer) and layer.state is not None and layer.state.shelves:
            facts = layer.state.shelves[0].facts
            told[f"layer {index} of {name}"] = explained(facts, facts.group)
        else:
            told[f"layer {index} of {name}"] = "the stock cache and attention (a sliding window)"
    return told


def _samples() -> Any:
    """Two samples to measure and one to check on, of tokens drawn at random that repeat in phrases."""
    from kvprofile.samples import Sample, SampleSet

    generator = torch.Generator().manual_seed(0)
    phrases = torch.randint(1, VOCABULARY, (12, 16), generator=generator)
    drawn = [phrases[torch.randint(0, 12, (20,), generator=generator)].flatten() for _ in range(3)]
    samples = [Sample(text[:CONTEXT], text[CONTEXT:], "random", "random") for text in drawn]
    return SampleSet(samples[:2], samples[2:], "random tokens", "0" * 64)
