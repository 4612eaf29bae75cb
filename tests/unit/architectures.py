"""Tiny random models of many architectures, each built from a configuration of its own."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.unit.tiny_models import VOCAB, random_model

_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LATENT = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Name: the configuration's class and its arguments.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GROUPED),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "Mistral, sliding": ("MistralConfig", {**_GROUPED, "sliding_window": 24}),
    "Mixtral": ("MixtralConfig", {**_GROUPED, **_EXPERTS}),
    "Qwen2": ("Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3Config", _HEADS),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    # A small cap, so that the logits would be wrong without it.
    "Gemma 2": (
        "Gemma2Config",
        {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 4.0},
    ),
    "Gemma 3": ("Gemma3TextConfig", {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 16}),
    # The last two layers read the keys and values of the two before.
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Phi-3": ("Phi3Config", {**_GROUPED, "sliding_window": None}),
    "GPT-NeoX": ("GPTNeoXConfig", _PLAIN),
    "GPT-2": ("GPT2Config", _GPT),
    "OLMo 2": ("Olmo2Config", _GROUPED),
    "OLMo 3": ("Olmo3Config", {**_GROUPED, **_SLIDING}),
    "Granite": ("GraniteConfig", _GROUPED),
    "Cohere": ("CohereConfig", _GROUPED),
    "Cohere 2": ("Cohere2Config", {**_GROUPED, **_SLIDING}),
    "SmolLM3": ("SmolLM3Config", _GROUPED),
    "StarCoder2": ("Starcoder2Config", {**_GROUPED, "sliding_window": None}),
    "GLM-4": ("Glm4Config", _HEADS),
    "OPT": ("OPTConfig", {**_PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "GPT-OSS": (
        "GptOssConfig",
        {**_HEADS, **_SLIDING, **_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "Llama 4": (
        "Llama4TextConfig",
        {
            **_HEADS,
            "attention_chunk_size": 24,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
        },
    ),
    "DeepSeek-V2": ("DeepseekV2Config", _LATENT),
    "DeepSeek-V3": ("DeepseekV3Config", _LATENT),
    "DiffLlama": ("DiffLlamaConfig", _GROUPED),
    "Falcon": (
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    ),
    "Bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "MPT": ("MptConfig", {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "GPT-J": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "CodeGen": ("CodeGenConfig", {**_GPT, "rotary_dim": 8}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global"], 2]],
            "max_position_embeddings": 512,
        },
    ),
    "XGLM": (
        "XGLMConfig",
        {"vocab_size": VOCAB, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    ),
}
REFUSED = (
    "DeepSeek-V2",
    "DeepSeek-V3",
    "DiffLlama",
    "Falcon",
    "Bloom",
    "MPT",
    "GPT-J",
    "CodeGen",
    "GPT-Neo",
    "XGLM",
)
SUPPORTED = tuple(name for name in _CONFIGS if name not in REFUSED)
# Their modelling code has no sdpa attention.
_EAGER = ("Gemma 2", "GPT-OSS", "Bloom", "MPT", "GPT-J", "CodeGen", "GPT-Neo", "XGLM")


def build(name: str, **changes: Any) -> PreTrainedModel:
    """Build a tiny model of an architecture with random float32 weights; `changes` go to its configuration."""
    kind, arguments = _CONFIGS[name]
    config = getattr(transformers, kind)(**{**arguments, **changes})
    model = random_model(config, attention="eager" if name in _EAGER else "sdpa")
    for part, weight in model.named_parameters():
        if part.endswith("sinks"):
            # As in the real models, where sinks take much of the attention, in some heads more than in others.
            weight.data += torch.arange(len(weight)) + 1.0
    return model
