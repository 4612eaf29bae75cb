"""A cache that holds merged slots, a different number for every head, and a short unmerged tail.

A merged layer stores two parts: `slots`, the merged tokens, flat and ragged over heads; and the tail, the newest tokens,
dense, with a little slack so that a decoded token costs no copy of everything. A prompt is attended to as it is and merged
right after each layer's attention, so prefill is exact and only one layer's full keys and values are alive at a time.
While the text grows, the oldest `CHUNK` tokens of the tail are merged whenever that many have aged.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from kvprofile.errors import KVProfileError
from kvprofile.merging.affinity import Tokens
from kvprofile.merging.combine import Slots, append_slots, select_rows
from kvprofile.merging.counts import slots_of
from kvprofile.merging.policies import merge_layer
from kvprofile.merging.scores import MASS_STRIDE, attention_mass, pooled, window_mass
from kvprofile.runtime.attention import MARK, AttentionCall
from kvprofile.runtime.masks import LogicalLength
from kvprofile.runtime.settings import LayerSetting

CHUNK = 32  # tokens that age before they are merged; past the protected ones, stored slots exceed the plan by no more


class MergedLayer(CacheLayerMixin):
    """One full-attention layer's cache."""

    is_sliding = False
    supports_early_init = False
    # The tail, `(batch, kv_heads, room, dim)`, of which the first `self.tail` tokens are in use.
    keys: Any
    values: Any

    def __init__(self, setting: LayerSetting) -> None:
        super().__init__()
        self.setting = setting
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.tail = 0
        # Heavy hitters protected so far, for every policy of the layer.
        self.heavy = [0] * len(self.setting.policies)
        self.slots: Slots | None = None
        self.mass: Tensor | None = None
        self.keys = self.values = None
        self.is_initialized = False
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch size, heads, dtype and device from the first keys."""
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the tail and return it, the key marked with this layer for our attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        added = key_states.shape[2]
        # A tensor made in inference mode cannot be written to outside of it.
        stale = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if stale or self.tail + added > self.keys.shape[2]:
            # A prompt is about to be merged or kept: no slack. A growing tail gets room for a chunk.
            room = self.tail + added + (CHUNK if self.tail else 0)
            self.keys, self.values = (_resized(old, self.tail, room) for old in (self.keys, self.values))
        self.keys[:, :, self.tail : self.tail + added] = key_states
        self.values[:, :, self.tail : self.tail + added] = value_states
        self.tail += added
        self.seen += added
        keys, values = self.keys[:, :, : self.tail], self.values[:, :, : self.tail]
        setattr(keys, MARK, self)
        self.pending = True
        return keys, values

    def attended(self, call: AttentionCall, output: Tensor, tail_mass: Tensor | None) -> None:
        """Count the attention the tail received and merge what has aged."""
        setting = self.setting
        if setting.keeps_all:
            self.pending = False
            return
        self.check(call)
        self.pending = False
        if setting.needs_mass or setting.windows:
            if tail_mass is None:
                tail_mass = attention_mass(call.query, call.key, call.scaling, stride=MASS_STRIDE, softcap=call.softcap)
            if self.mass is not None:
                tail_mass[..., : self.mass.shape[-1]] += self.mass
            self.mass = tail_mass
        recent = max(policy.protection.recent_tokens(self.seen) for policy, _ in setting.policies)
        if self.tail - recent >= CHUNK:
            # Once slots exist the tail's own mass comes from the newest queries anyway.
            windows = {
                size: window_mass(call.query, call.key, call.scaling, window=size, softcap=call.softcap)
                if self.mass is None or self.slots is None
                else pooled(self.mass)
                for size in setting.windows
            }
            tokens = Tokens(
                self.keys[:, :, : self.tail],
                self.values[:, :, : self.tail],
                self.mass,
                windows,
                self.seen - self.tail,
                self.seen,
            )
            self._merge(tokens.oldest(self.tail - recent), recent)

    def check(self, call: AttentionCall) -> None:
        """Raise KVProfileError where merging would silently give wrong numbers."""
        if not self.pending:
            raise KVProfileError(
                "this model attends to one layer's keys more than once in a forward (shared or differential attention), "
                "which a merged cache does not support; generate with the stock cache"
            )
        call.check_supported()

    def _merge(self, tokens: Tokens, recent: int) -> None:
        """Turn `tokens`, the oldest of the tail, into slots; `recent` stay."""
        batch, kv_heads = self.keys.shape[:2]
        count = None
        if self.setting.exact:
            wanted = slots_of(self.setting.share, self.seen).expand(batch, kv_heads)
            stored = 0 if self.slots is None else torch.tensor(self.slots.lengths).view(batch, kv_heads)
            count = wanted - stored - recent
        heavy = [policy.protection.heavy_tokens(self.seen) for policy, _ in self.setting.policies]
        merged = merge_layer(
            tokens,
            self.setting.policies,
            epsilon=self.setting.epsilon,
            count=count,
            heavy=tuple(now - before for now, before in zip(heavy, self.heavy, strict=True)),
        )
        self.heavy = heavy
        self.slots = merged if self.slots is None else append_slots(self.slots, merged)
        aged = self.tail - recent
        # Copies, not slices: a slice would keep the whole prompt's storage alive.
        self.keys, self.values = (old[:, :, aged : self.tail].clone() for old in (self.keys, self.values))
        self.tail = recent
        if self.mass is not None:
            self.mass = self.mass[..., aged:].clone()

    def lengths(self) -> list[list[int]]:
        """Slots stored now, per batch row and KV head, the tail included."""
        if not self.is_initialized:
            return []
        batch, kv_heads = self.keys.shape[:2]
        merged = [0] * (batch * kv_heads) if self.slots is None else self.slots.lengths
        return [[merged[row * kv_heads + head] + self.tail for head in range(kv_heads)] for row in range(batch)]

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, side tensors included."""
        parts = [self.keys, self.values, self.mass]
        if self.slots is not None:
            parts += [self.slots.keys, self.slots.values, self.slots.bias]
        return [part for part in parts if part is not None]

    def get_seq_length(self) -> int:
        """Tokens seen: true positions, never slots."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens seen after this forward; the type tells our mask function to keep the recipe."""
        return LogicalLength(self.seen + query_length), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        if not self.is_initialized:
            return
        kv_heads = self.keys.shape[1]
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self.mass is not None:
            self.mass = self.mass[indices]
        if self.slots is not None:
            self.slots = select_rows(self.slots, indices.tolist(), kv_heads)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: merged tokens cannot be taken back."""
        if tokens_to_remove:
            raise KVProfileError(
                "a merged cache cannot be cropped; generate without an assistant model or prompt lookup, or use the stock cache"
            )

    def offload(self) -> None:
        """Refuse: offloading is not supported."""
        raise KVProfileError("a merged cache cannot be offloaded; keep it on the model's device")

    prefetch = offload


class Attachment:
    """Whether a merger is attached to its model now: shared by all its caches and their copies."""

    def __init__(self) -> None:
        self.active = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        return self


class MergedCache(Cache):
    """The cache to pass as `past_key_values`; made by `KVMerger.cache()`, one for each generation.

    Full-attention layers are merged; sliding, chunked and linear layers keep their stock cache.
    """

    def __init__(self, config: PretrainedConfig, settings: dict[int, LayerSetting], attachment: Attachment) -> None:
        self.attachment = attachment
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        super().__init__(
            layers=[
                MergedLayer(settings[index]) if index in settings else DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords)
                for index, (kind, keywords) in enumerate(zip(types, arguments, strict=True))
            ]
        )

    def _first(self) -> MergedLayer | None:
        return next((layer for layer in self.layers if isinstance(layer, MergedLayer)), None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values. Raises KVProfileError if the layer before was not attended by us."""
        layer = self.layers[layer_idx]
        if isinstance(layer, MergedLayer):
            others = [other for other in self.layers if isinstance(other, MergedLayer) and other is not layer]
            # Layers are updated in turn: those before this one have seen this forward's tokens, those after have not. The
            # first to be updated must find all of them level, or an earlier forward did not come to its end.
            torn = layer is self._first() and any(other.seen != layer.seen for other in others)
            if not self.attachment.active or torn or layer.pending or any(other.pending for other in others):
                raise KVProfileError(
                    "a merged cache was used with a model that is not attached (or was detached, or failed half-way in an "
                    "earlier forward); call merger.attach(model) and start with a new merger.cache(). Models that rebuild keys "
                    "after the cache (multi-head latent attention) are not supported"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def slots(self) -> list[list[list[int]]]:
        """Slots stored now: per layer, per batch row, per KV head; stock layers count what they hold."""
        return [
            layer.lengths()
            if isinstance(layer, MergedLayer)
            else [[layer.keys.shape[2]] * layer.keys.shape[1]] * layer.keys.shape[0]
            if getattr(layer, "keys", None) is not None
            else []
            for layer in self.layers
        ]

    def nbytes(self) -> int:
        """Bytes really allocated: keys, values and every side tensor, slack included."""
        tensors = [
            tensor
            for layer in self.layers
            for tensor in (layer.tensors() if isinstance(layer, MergedLayer) else _tensors(vars(layer)))
        ]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def _tensors(held: Any) -> list[Tensor]:
    """Every tensor in the attributes of a stock layer, whatever kind it is."""
    if isinstance(held, Tensor):
        return [held]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _resized(old: Tensor, used: int, room: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], room, old.shape[3])
    new[:, :, :used] = old[:, :, :used]
    return new
