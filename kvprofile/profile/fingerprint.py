"""What makes two models the same to a profile: the facts of the configuration that shape keys, values and positions."""

import hashlib
import json
from typing import Any

from kvprofile.errors import MismatchError

# Shape and positions. Names, dtypes, versions and generation settings are left out: they change nothing here.
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "max_position_embeddings",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
)

# What is compared, the most telling first.
FACTS = ("architecture", "layers", "query_heads", "kv_heads", "head_dim", "attention", "rope", "config_hash")


def model_facts(config: Any) -> dict[str, Any]:
    """Read the facts of a transformers configuration, as JSON values.

    `attention` lists the kind of every layer (`full_attention`, `sliding_attention`, ...): only full-attention layers are
    merged. `config_hash` is the SHA-256 of the facts that shape the cache.
    """
    text = config.get_text_config(decoder=True)
    values = {name: getattr(text, name, None) for name in _SHAPE}
    encoded = json.dumps(values, sort_keys=True, default=str)
    heads = text.num_attention_heads
    return {
        "architecture": (getattr(config, "architectures", None) or [type(config).__name__.replace("Config", "")])[0],
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "query_heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "attention": _attention(text),
        "rope": json.loads(json.dumps(values["rope_parameters"], default=str)),
        "config_hash": hashlib.sha256(encoded.encode()).hexdigest(),
        "window": _window(text),
    }


def _window(text: Any) -> int | None:
    """Tokens that sliding or chunked layers see at most; None where there are none, or not all see as many."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    found = {
        keywords["sliding_window"] for keywords in get_layer_types_and_kwargs(text)[1] if "sliding_window" in keywords
    }
    return found.pop() if len(found) == 1 else None


def _attention(text: Any) -> list[str]:
    """The kind of every layer; `shared_attention` where a layer reads the keys of one before it and stores none."""
    kinds = list(
        getattr(text, "layer_types", None)
        or ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"] * text.num_hidden_layers
    )
    sharing = getattr(text, "kv_sharing_modes", None) or [None] * len(kinds)
    return ["shared_attention" if mode == "reuse" else kind for kind, mode in zip(kinds, sharing, strict=True)]


def check_fit(name: str, profile: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise MismatchError unless a profile made for the model `name` with these facts fits a model with those."""
    mismatch = difference(profile, model)
    if mismatch:
        raise MismatchError(
            f"the profile was made for {name} and does not fit this model: {mismatch}; calibrate this model"
        )


def difference(profile: dict[str, Any], model: dict[str, Any]) -> str | None:
    """Say in one clause how the profile's model differs from the model at hand, or None if they are the same."""
    for fact in FACTS[:-1]:
        if profile[fact] != model[fact]:
            return f"{fact.replace('_', ' ')} is {profile[fact]} in the profile and {model[fact]} in the model"
    if profile["config_hash"] != model["config_hash"]:
        return "the configurations differ (config_hash)"
    return None
