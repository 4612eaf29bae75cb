"""Taps keys, values and queries of a running model, layer by layer, without keeping any of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from kvprofile.errors import KVProfileError
from kvprofile.runtime.attention import MARK, AttentionCall, install, restore
from kvprofile.runtime.masks import LogicalLength

Watcher = Callable[[int, AttentionCall], None]


class _WatchedLayer(CacheLayerMixin):
    """Passes keys and values through, so that they reach our attention function marked, and stores nothing."""

    slots = None

    def __init__(self, index: int, is_sliding: bool, watch: Watcher) -> None:
        super().__init__()
        self.index, self.is_sliding, self.watch = index, is_sliding, watch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        setattr(key_states, MARK, self)
        return key_states, value_states

    def attended(self, call: AttentionCall, _tail_mass: Tensor | None) -> None:
        self.watch(self.index, call)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return LogicalLength(query_length), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def observe(model: PreTrainedModel, tokens: Tensor, watch: Watcher) -> None:
    """Run one forward over `tokens` `(batch, tokens)` and call `watch(layer, call)` after every layer's attention.

    The call holds post-RoPE queries and keys as the cache would store them. Nothing is kept once `watch` returns, so the
    memory is that of a forward without a cache. Raises KVProfileError if the model's attention never came by.
    """
    seen: list[int] = []

    def note(layer: int, call: AttentionCall) -> None:
        seen.append(layer)
        watch(layer, call)

    types, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    layers = []
    for index, (kind, keywords) in enumerate(zip(types, arguments, strict=True)):
        stock = DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords)
        plain = isinstance(stock, DynamicLayer)
        layers.append(_WatchedLayer(index, stock.is_sliding, note) if plain else stock)
    install(model)
    try:
        with torch.inference_mode():
            model(tokens.to(model.device), past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1)
    finally:
        restore(model)
    if not seen:
        raise KVProfileError(
            f"{type(model).__name__} does not use transformers' attention interface, so its keys cannot be observed; "
            "kvprofile supports models whose attention implementation can be switched"
        )
