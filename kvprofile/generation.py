"""One generation with a merged cache, and what the cache held at its end."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.models.context_length import beyond_context, longest_text
from kvprofile.models.device_memory import explaining_memory
from kvprofile.models.offloading import input_device
from kvprofile.profile.profile import Profile
from kvprofile.runtime.cache import allocated_bytes
from kvprofile.runtime.merger import KVMerger


@dataclass(frozen=True)
class Generation:
    """Generated text with the cache's size when it was done.

    tokens: tokens seen, prompt and answer. slots: mean slots per head over the merged layers. nbytes: bytes allocated.
    full_nbytes: what keys and values of every token would take.
    """

    text: str
    tokens: int
    slots: float
    nbytes: int
    full_nbytes: int

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens seen, {self.slots:.0f} slots a head ({self.slots / self.tokens:.1%}), cache "
            f"{self.nbytes / 2**20:.1f} MiB of {self.full_nbytes / 2**20:.1f} MiB ({self.nbytes / self.full_nbytes:.1%})"
        )


def generate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    profile: "str | Path | Profile | dict[str, Any] | None" = None,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    mode: str | None = None,
    seed: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Generation:
    """Answer or continue a text, the cache merged as `profile` says; without a profile the stock cache is used.

    chat: put the text into the tokenizer's chat template as a user's message; None: where the tokenizer has a template. Greedy,
    or sampling if a seed is given. The model may have an adapter of PEFT around it; it is left as it was. `warn` is told,
    before anything is read, if prompt and answer can be longer than the model was made for.

    Raises KVProfileError for an empty text, UsageError for a chat without a template, MismatchError for a profile of another
    model.
    """
    inputs = _inputs(tokenizer, text, chat).to(input_device(model))
    length = inputs["input_ids"].shape[1]
    if message := beyond_context(longest_text(model.config), length + max_new_tokens, "prompt and answer take up to"):
        warn(message)
    if seed is not None:
        torch.manual_seed(seed)
    merger = None if profile is None else KVMerger.from_profile(profile, mode=mode).attach(model)
    cache = DynamicCache(config=model.config) if merger is None else merger.cache()
    try:
        doing = f"generating after a prompt of {length:,} tokens"
        with explaining_memory(model, doing, "give a shorter prompt or fewer --max-new-tokens"):
            output = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=seed is not None
            )
    finally:
        if merger is not None:
            merger.detach()
    text = tokenizer.decode(output[0, length:], skip_special_tokens=True)
    seen = cache.get_seq_length()
    # Layers that share another layer's keys, and linear ones, store none.
    stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    token_bytes = sum(2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size() for layer in stored)
    if merger is None:
        return Generation(text, seen, seen, allocated_bytes(cache), seen * token_bytes)
    lengths = [count for index in merger.settings.layers for row in cache.slots()[index] for count in row]
    return Generation(text, seen, sum(lengths) / len(lengths), cache.nbytes(), seen * token_bytes)


def _inputs(tokenizer: Any, text: str, chat: bool | None) -> Any:
    """Token ids and mask `(1, tokens)` of a text, in the chat template or raw."""
    template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not template:
        raise UsageError(
            "a chat was asked for and the tokenizer has no chat template; give the text raw, or take a chat model"
        )
    special = chat is False or not template  # a template brings its own
    if text and not special:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(
        text, return_tensors="pt", verbose=False, add_special_tokens=special, return_token_type_ids=False
    )
    if not inputs["input_ids"].shape[1]:
        raise KVProfileError("the prompt is empty; give some text with --prompt or --prompt-file")
    return inputs
