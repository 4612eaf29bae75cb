"""Whether a text is longer than the model was made for."""

from typing import Any


class ContextLengthWarning(UserWarning):
    """A text is longer than the model was made for."""


def longest_text(config: Any) -> int | None:
    """Tokens a transformers configuration says the model was made for; None where it does not say.

    Rotary positions that are stretched count with their factor (YaRN in its published form leaves
    `max_position_embeddings` at the length before).
    """
    text = config.get_text_config(decoder=True)
    lengths = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
        lengths.append(int(factor * original) if factor and original else None)
    return max((length for length in lengths if length), default=None)


def beyond_context(longest: int | None, tokens: int, what: str) -> str | None:
    """One line to warn with if `what` takes more tokens than the model was made for, or None."""
    if longest is None or tokens <= longest:
        return None
    return (
        f"{what} {tokens:,} tokens, and the model was made for {longest:,} (max_position_embeddings): what it says beyond them "
        "cannot be relied on; read a shorter text, or take a model for longer ones"
    )
