"""Tiny random models, texts and profiles, made in memory: no download, the same at every run."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from kvprofile.merging.policies import POLICIES
from kvprofile.profile.fingerprint import model_facts
from kvprofile.profile.unmeasured import unmeasured_values

VOCAB = 640
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": 24, "query_pre_attn_scalar": 16}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma3": (Gemma3TextConfig, {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    # A small cap, so that the logits would be wrong without it.
    "gemma2": (
        Gemma2Config,
        {**_SLIDING, "attn_logit_softcapping": 4.0, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def tiny_model(name: str = "llama", *, attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build one of the small models with random float32 weights; `changes` go to its configuration."""
    config_class, arguments = _CONFIGS[name]
    return random_model(config_class(**{**_COMMON, **arguments, **changes}), attention=attention, seed=seed)


def random_model(config: PreTrainedConfig, *, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Build a model from any configuration with weights wide enough that no head looks everywhere alike."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sharper = any(part in name for part in ("q_proj.weight", "k_proj.weight", "q_norm", "k_norm"))
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                # Unit variance through every layer, and logits with a standard deviation of a few units.
                fan_in = 1 if "embed" in name else weight.shape[-1]
                weight.copy_(drawn * (1.6 if sharper else 1.0) * fan_in**-0.5)
            else:
                # Norms and biases: around what the model starts with.
                weight.add_(0.2 * drawn + (0.6 if sharper else 0.0))
    return model


def tiny_text(tokens: int, *, batch: int = 1, seed: int = 0, vocabulary: int = VOCAB) -> Tensor:
    """Draw token ids `(batch, tokens)`.

    No id comes twice in a row of up to `vocabulary - 1` tokens, so that no two links or masses are equal by construction.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(vocabulary - 1, generator=generator) + 1 for _ in range(batch)]
    return torch.stack([row.repeat(tokens // len(row) + 1)[:tokens] for row in order])


def profile_values(
    model: PreTrainedModel,
    heads: "list[dict[str, Any]] | dict[int, list[dict[str, Any]]]",
    *,
    mode: str = "exact",
) -> dict[str, Any]:
    """A profile's JSON values for every full-attention layer: `heads` for all layers, or by layer index."""
    facts = model_facts(model.config)
    full = [layer for layer, kind in enumerate(facts["attention"]) if kind == "full_attention"]
    by_layer = heads if isinstance(heads, dict) else dict.fromkeys(full, heads)
    names = sorted({head["policy"] for plan in by_layer.values() for head in plan} or {"gauss"})
    policies = {name: POLICIES[name].to_dict() for name in names}
    return unmeasured_values("tiny", facts, policies, {layer: by_layer[layer] for layer in full}, mode=mode)


def head(
    policy: str = "gauss",
    *,
    epsilon: float | None = None,
    share: float = 1.0,
    codecs: tuple[str, str] = ("none", "none"),
) -> dict[str, Any]:
    """One KV head's part of a plan."""
    return {"policy": policy, "epsilon": epsilon, "share": share, "key_codec": codecs[0], "value_codec": codecs[1]}


def uniform_values(
    model: PreTrainedModel,
    policy: str = "gauss",
    *,
    mode: str = "exact",
    epsilon: float | None = None,
    share: float = 1.0,
) -> dict[str, Any]:
    """A profile's JSON values with the same plan for every KV head."""
    kv_heads = model_facts(model.config)["kv_heads"]
    return profile_values(model, [head(policy, epsilon=epsilon, share=share)] * kv_heads, mode=mode)
