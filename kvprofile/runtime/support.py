"""Whether a model's attention can be followed: found by running a few tokens through it, never by its name.

Once, when a model is attached, every full-attention layer gets a probe for a cache. It sees what is stored, who attends to
it, and whether our attention over the same keys and values gives what the model's own gave.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kvprofile.errors import KVProfileError
from kvprofile.models.offloading import input_device
from kvprofile.runtime.attention import MARK, AttentionCall, UnmarkedKeysError
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.masks import LogicalLength

TOKENS = 8  # enough for attention to differ from a mean, whatever the weights
TOLERANCE = 0.05  # relative; half precision stays within 0.01, another kind of attention is far outside


class _Probe(CacheLayerMixin):
    """Stores nothing; remembers who attended to the keys and values that came by."""

    def __init__(self, *, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.stored: tuple[Tensor, Tensor] | None = None
        self.readers: list[torch.nn.Module] = []
        self.changed = False
        self.error = 0.0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        setattr(key_states, MARK, self)
        self.stored = key_states, value_states
        return self.stored

    def check(self, call: AttentionCall) -> None:
        pass

    def attend(self, _call: AttentionCall) -> None:
        return None

    def attended(self, call: AttentionCall, output: Tensor, _tail_mass: Tensor | None) -> None:
        assert call.module is not None
        self.readers.append(call.module)
        if self.stored is None or call.value is not self.stored[1]:
            self.changed = True
            return
        ours, _ = ragged_attention(call, [], mass=False)
        error = (ours.float() - output.float()).norm() / output.float().norm().clamp_min(1e-20)
        if torch.isfinite(error):
            self.error = max(self.error, float(error))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # The masks of sliding layers are the stock ones: what else attends with them is none of our business.
        return query_length if self.is_sliding else LogicalLength(query_length), 0

    def get_seq_length(self) -> int:
        return 0

    @property
    def followed(self) -> bool:
        """True if our attention gives what the model's own does."""
        return bool(self.readers) and not self.changed and self.error <= TOLERANCE

    def get_max_length(self) -> int:
        return -1


@torch.no_grad()
def find_readers(model: PreTrainedModel) -> dict[int, list[torch.nn.Module]]:
    """Find, for every layer of a model that uses our attention, the modules that attend to its keys.

    Those with a sliding window whose attention is not a softmax over the keys and values they store are left out: the stock
    cache serves them. Raises KVProfileError where that is so of a layer with full attention.
    """
    types, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    layers: list[Any] = []
    for kind, keywords in zip(types, arguments, strict=True):
        stock = DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords)
        plain = type(stock) in (DynamicLayer, DynamicSlidingWindowLayer)
        layers.append(_Probe(is_sliding=stock.is_sliding) if plain else stock)
    tokens = torch.arange(1, TOKENS + 1, device=input_device(model))[None]
    probes = {index: layer for index, layer in enumerate(layers) if isinstance(layer, _Probe)}
    try:
        model(tokens, past_key_values=Cache(layers=layers), use_cache=True)
    except UnmarkedKeysError:
        if any(probe.readers for probe in probes.values() if not probe.is_sliding):
            raise
        # No layer reads what it stores: what that means is said below.
    name = type(model).__name__
    for index, probe in probes.items():
        if probe.is_sliding:
            continue
        if probe.stored is None:
            raise KVProfileError(
                f"layer {index} of {name} stores no keys in the cache it is given, so there is nothing to merge; use the "
                "stock cache"
            )
        if not probe.readers:
            raise KVProfileError(
                f"{name} does not attend to the keys it stores but to keys rebuilt from them (multi-head latent attention), "
                "which a merged cache does not support; use the stock cache"
            )
        if probe.changed:
            raise KVProfileError(
                f"{name} does not attend to the values it stores but mixes them across heads, which a merged cache does not "
                "support; use the stock cache"
            )
        if probe.error > TOLERANCE:
            raise KVProfileError(
                f"layer {index} of {name} computes attention in a way of its own (our result is off by {probe.error:.0%}), "
                "which a merged cache does not support; use the stock cache"
            )
    return {index: probe.readers for index, probe in probes.items() if not probe.is_sliding or probe.followed}
