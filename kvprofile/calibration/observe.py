"""Taps keys, values and queries of a running model, layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from kvprofile.calibration.probe_attention import Surroundings, probe_attention
from kvprofile.errors import KVProfileError
from kvprofile.models.offloading import input_device
from kvprofile.runtime.attention import MARK, AttentionCall
from kvprofile.runtime.install import install, restore
from kvprofile.runtime.masks import LogicalLength, MaskRecipe

Watcher = Callable[[int, AttentionCall, Tensor], None]


class _WatchedLayer(CacheLayerMixin):
    """Passes keys and values through, so that they reach our attention function marked.

    context: the keys and values that were kept, `(1, kv_heads, tokens, dim)` each.
    """

    def __init__(self, index: int, is_sliding: bool, observer: "Observer") -> None:
        super().__init__()
        self.index, self.is_sliding, self.observer = index, is_sliding, observer
        self.context: tuple[Tensor, Tensor] | None = None
        self.unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.observer.keeps:
            if self.context is not None:
                key_states = torch.cat([self.context[0], key_states], dim=2)
                value_states = torch.cat([self.context[1], value_states], dim=2)
            self.context = key_states, value_states
        setattr(key_states, MARK, self)
        self.unread = True
        return key_states, value_states

    def check(self, call: AttentionCall) -> None:
        pass

    def attend(self, call: AttentionCall) -> tuple[Tensor, None] | None:
        if self.context is None or self.observer.keeps:
            return None
        mask = call.mask.stock() if isinstance(call.mask, MaskRecipe) else call.mask
        if mask is not None:
            mask = mask.to(call.query.device)  # it is built where the model's input lies
        keys, values = self.context
        around = Surroundings(keys[0], values[0], None if mask is None else mask[0, 0], call.softmax)
        return probe_attention(call.query[0], call.key[0], call.value[0], around)[None], None

    def attended(self, call: AttentionCall, output: Tensor, _tail_mass: Tensor | None) -> None:
        self.observer.seen = True
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # the first layer's: the graph begins here, the weights take no gradient
        # Layers that read another layer's keys are not watched beside it.
        if self.unread:
            self.unread = False
            self.observer.watch(self.index, call, output)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return LogicalLength(self.get_seq_length() + query_length), 0

    def get_seq_length(self) -> int:
        return 0 if self.context is None else self.context[0].shape[2]

    def get_max_length(self) -> int:
        return -1


class Observer:
    """A model under observation; made by `observing`.

    Reads tokens and hands every layer's attention to a watcher. Nothing is kept unless asked for, so a plain `read` needs
    no more memory than a forward without a cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.keeps = False
        self.seen = False
        self.watch: Watcher = _ignore
        self.cache = self._cache()

    def _cache(self) -> Cache:
        types, arguments = get_layer_types_and_kwargs(self.model.config.get_text_config(decoder=True))
        layers = []
        for index, (kind, keywords) in enumerate(zip(types, arguments, strict=True)):
            stock = DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords)
            plain = isinstance(stock, DynamicLayer)
            layers.append(_WatchedLayer(index, stock.is_sliding, self) if plain else stock)
        return Cache(layers=layers)

    def context(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a layer that were kept, `(1, kv_heads, tokens, dim)` each."""
        kept: tuple[Tensor, Tensor] | None = getattr(self.cache.layers[layer], "context", None)
        return kept

    def read(self, tokens: Tensor, watch: Watcher, *, keep: bool = False, grad: bool = False) -> Tensor:
        """Run one forward over `tokens` `(tokens,)`, after those just kept, if any, and call `watch(layer, call, output)`.

        With `keep` the keys and values stay, as the context of the next read; without it they are let go. A call holds the
        keys and values of all tokens where they are kept, of `tokens` alone where they only look back at a `context`.
        Returns the logits: of the last token only,
        or with `grad` of every token, with the graph from the attention outputs to them.

        Raises KVProfileError if the model's attention never came by.
        """
        self.keeps, self.watch = keep, watch
        with torch.enable_grad() if grad else torch.no_grad():
            logits = self.model(
                tokens[None].to(input_device(self.model)),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if grad else 1,
            ).logits[0]
        if not keep:
            # The layers that are not watched keep a state of their own; the next read begins anew.
            self.cache = self._cache()
        if not self.seen:
            raise KVProfileError(
                f"{type(self.model).__name__} does not use transformers' attention interface, so its keys cannot be "
                "observed; kvprofile supports models whose attention implementation can be switched"
            )
        return logits


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[Observer]:
    """Put a model under observation; it is as it was afterwards, also after an error."""
    install(model)
    try:
        yield Observer(model)
    finally:
        restore(model)


def _ignore(_layer: int, _call: AttentionCall, _output: Tensor) -> None:
    """Watch nothing."""
