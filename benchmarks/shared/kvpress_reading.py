"""What kvpress' presses lose on one document; peers_fidelity.py runs this file inside the environment of kvpress.

The attention of a prompt is exact whatever a press does after it, so a document is read once: what a press' hook is called
with in every layer is recorded, and every press' own hook is called with it. KVzip and KVCompose read the document again in
their own way, once for all budgets. Compressed caches are read as by kvpress' own pipeline: at true positions, keys that AdaKV
and KVzip only hide hidden in the attention, every layer's mask as long as its own slots. KVzip takes a tokenizer's chat
template for a sign that the context is wrapped in it, and leaves the wrapping's tokens without a score; the contexts here are
plain, so it gets the tokenizer without.
"""

import copy
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prefill:
    """A document read once: `tokens` `(1, tokens)`, the full cache, and every layer's attention as its hook saw it."""

    tokens: Any
    cache: Any
    calls: list[tuple[Any, Any, dict[str, Any], Any]]


def make_prefill(model: Any, context: list[int]) -> Prefill:
    """Read a context `(tokens,)` without any press."""
    import torch
    from transformers import DynamicCache

    filled = Prefill(torch.tensor([context]), DynamicCache(), [])
    hooks = [
        layer.self_attn.register_forward_hook(lambda *call: filled.calls.append(call), with_kwargs=True)
        for layer in model.model.layers
    ]
    try:
        model.model(input_ids=filled.tokens, past_key_values=filled.cache)
    finally:
        for hook in hooks:
            hook.remove()
    return filled


def compressed(model: Any, filled: Prefill, name: str, budgets: list[float], seed: int) -> Iterator[Any]:
    """The cache of a press, set up as kvpress does by default, at every budget; hidden keys are the model's until the next."""
    ratios = [1 - budget for budget in budgets]
    forget_hidden(model)
    if name == "KVzip":
        yield from compressed_by_kvzip(model, filled, ratios)
    elif name == "KVCompose":
        yield from compressed_by_kvcompose(model, filled, ratios)
    else:
        for ratio in ratios:
            forget_hidden(model)
            yield compressed_by_hook(model, filled, name, ratio, seed)


def forget_hidden(model: Any) -> None:
    """Show all keys to the attention again: kvpress does so at a prefill, but not at KVCompose's."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


def compressed_by_hook(model: Any, filled: Prefill, name: str, ratio: float, seed: int) -> Any:
    """The cache of a press that works in every layer's hook."""
    import kvpress
    import torch

    torch.manual_seed(seed)  # Compactor draws a sketch
    if name == "AdaKV(ExpectedAttention)":
        press = kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(compression_ratio=ratio))
    elif name == "Merging(SnapKV)":
        press = kvpress.MergingPress(kvpress.SnapKVPress(compression_ratio=ratio))
    else:
        press = getattr(kvpress, f"{name}Press")(compression_ratio=ratio)
    cache = copy.deepcopy(filled.cache)
    with press(model):
        for module, arguments, kwargs, output in filled.calls:
            press.forward_hook(module, arguments, {**kwargs, "past_key_values": cache}, output)
    return cache


def compressed_by_kvzip(model: Any, filled: Prefill, ratios: list[float]) -> Iterator[Any]:
    """The full cache, with other keys hidden for every ratio: tokens are scored once, and the scores do not depend on it."""
    import kvpress

    press = kvpress.KVzipPress(compression_ratio=0.5)
    scores = []
    hide, press.compress_post = press.compress_post, lambda _model: scores.append(press.score_val)
    cache = copy.deepcopy(filled.cache)
    with press(model):
        press._context_ids, press._cache = filled.tokens, cache  # as left by a prefill in here
    for press.compression_ratio in ratios:
        forget_hidden(model)
        press.score_val = scores[0].clone()
        hide(model)
        yield cache


def compressed_by_kvcompose(model: Any, filled: Prefill, ratios: list[float]) -> Iterator[Any]:
    """A cache for every ratio: tokens are scored once, and the scores do not depend on it."""
    import kvpress
    from transformers import DynamicCache

    press = kvpress.KVComposePress(compression_ratio=0.5)
    last, caches = DynamicCache(), []
    with press(model):
        model.model(input_ids=filled.tokens, past_key_values=last)
        for press.compression_ratio in ratios[:-1]:
            caches.append(copy.deepcopy(last))
            press.cache = caches[-1]
            press.prepare_important_masks()
            press.compress_cache(model)
        # The same is done at the end of this block.
        press.cache, press.compression_ratio = last, ratios[-1]
    yield from [*caches, last]


def fit_mask(module: Any, arguments: Any, kwargs: dict[str, Any]) -> Any:
    """Give a layer's attention the last columns of the mask, which was built for the first layer's slots, by its own."""
    if kwargs["attention_mask"] is not None:
        slots = kwargs["past_key_values"].layers[module.layer_idx].keys.shape[-2]
        length = slots + kwargs["hidden_states"].shape[1]
        kwargs["attention_mask"] = kwargs["attention_mask"][..., -length:]
    return arguments, kwargs


def read(model: Any, filled: Any, tokens: list[int], position: int) -> tuple[Any, Any]:
    """Log-probabilities `(tokens, vocabulary)` of tokens read from a copy of a filled cache, and that copy."""
    import torch

    own = copy.deepcopy(filled)
    hooks = [layer.self_attn.register_forward_pre_hook(fit_mask, with_kwargs=True) for layer in model.model.layers]
    try:
        # No cache_position: the mask counts slots, only the rotation counts positions.
        places = torch.arange(position, position + len(tokens))[None]
        logits = model(torch.tensor([tokens]), past_key_values=own, position_ids=places).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.log_softmax(logits.float(), dim=-1), own


def sizes(model: Any, filled: Any, token: int, tokens: int) -> dict[str, float]:
    """Bytes before and after the next token is read (that token's own left out), and the share of slots that can be read."""
    parts = [part for layer in filled.layers for part in (layer.keys, layer.values)]
    after = [part for layer in read(model, filled, [token], tokens)[1].layers for part in (layer.keys, layer.values)]

    def stored(tensors: list[Any]) -> int:
        return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values())

    hidden = sum(
        len(layer.self_attn.masked_key_indices[0])
        for layer in model.model.layers
        if getattr(layer.self_attn, "masked_key_indices", None) is not None
    )
    slots = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in filled.layers)
    return {
        "held": stored(parts),
        "bytes": stored(after) - sum(part[..., :1, :].nbytes for part in after),
        "slots": (slots - hidden) / sum(layer.keys.shape[1] * tokens for layer in filled.layers),
    }


def measure(
    model: Any, document: dict[str, Any], cache: Any, reference: list[Any] | None
) -> tuple[dict[str, Any], list[Any]]:
    """Sizes and measures of a cache, and the scored rows of every probe. Without a reference it is its own."""
    import torch

    tokens = len(document["context"])
    rows = [read(model, cache, probe["tokens"], tokens)[0][slice(*probe["scored"])] for probe in document["probes"]]
    values: dict[str, float] = {}
    for name in document["parts"]:
        chosen = [place for place, probe in enumerate(document["probes"]) if probe["name"] == name]
        own = torch.cat([rows[place] for place in chosen])
        full = own if reference is None else torch.cat([reference[place] for place in chosen])
        foretold = torch.tensor([token for place in chosen for token in document["probes"][place]["foretold"]])
        values[f"{name} KL"] = float((full.exp() * (full - own)).sum(-1).mean().clamp(min=0))
        values[f"{name} top-1"] = float((full.argmax(-1) == own.argmax(-1)).float().mean())
        values[f"{name} NLL"] = float(-own.gather(-1, foretold[:, None]).mean())
    return {**sizes(model, cache, document["context"][0], tokens), "values": values}, rows


def measure_all(model: Any, document: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """A row for the full cache, then one for everything that is wanted; a press that cannot be run has an `error`."""
    began = time.perf_counter()
    filled = make_prefill(model, document["context"])
    found, reference = measure(model, document, filled.cache, None)
    yield {"press": None, "budget": 1.0, **found, "seconds": time.perf_counter() - began}
    for press, budgets in document["wanted"].items():
        began = time.perf_counter()
        unfinished = list(budgets)
        try:
            for cache in compressed(model, filled, press, budgets, seed):
                found = measure(model, document, cache, reference)[0]
                row = {"press": press, "budget": unfinished.pop(0), **found}
                yield {**row, "seconds": time.perf_counter() - began}
                began = time.perf_counter()
        except (AssertionError, RuntimeError, ValueError) as error:
            for budget in unfinished:
                yield {"press": press, "budget": budget, "error": f"{type(error).__name__}: {error}", "seconds": 0.0}


def inside(asked: dict[str, Any]) -> None:
    """Print one JSON line for every finished press, budget and document."""
    logging.disable(logging.WARNING)
    # It wraps the attention functions, and must do so before a model is loaded.
    import kvpress  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_grad_enabled(False)
    folder = asked["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with tempfile.TemporaryDirectory() as plain:
        tokenizer.save_pretrained(plain)
        model.config.name_or_path = plain  # where KVzip looks for its tokenizer
        for document in asked["documents"]:
            for row in measure_all(model, document, asked["seed"]):
                print(json.dumps({"document": document["index"], **row}), flush=True)


if __name__ == "__main__":
    inside(json.loads(Path(sys.argv[-1]).read_text()))
