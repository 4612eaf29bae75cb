"""The cache to generate with: merged layers where the profile merges, the stock layers everywhere else."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kvprofile.errors import KVProfileError
from kvprofile.models.context_length import ContextLengthWarning, beyond_context, longest_text
from kvprofile.runtime.attachment import Attachment
from kvprofile.runtime.layer import MergedLayer
from kvprofile.runtime.own_layer import OwnLayer
from kvprofile.runtime.settings import LayerSetting
from kvprofile.runtime.window import PackedWindow
from kvprofile.runtime.window_setting import WindowSetting


class MergedCache(Cache):
    """The cache to pass as `past_key_values`; made by `KVMerger.cache()`, one for each generation.

    Full-attention layers are merged. Layers with a sliding window are packed where a setting says how; they and all others
    keep their stock cache else.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        settings: dict[int, LayerSetting],
        attachment: Attachment,
        windows: Mapping[int, WindowSetting] | None = None,
    ) -> None:
        windows = windows or {}
        self.attachment = attachment
        # Told once: None from then on, as where the model does not say.
        self.longest = longest_text(config)
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        super().__init__(
            layers=[
                MergedLayer(settings[index], index, attachment)
                if index in settings
                else PackedWindow(windows[index], index, attachment)
                if index in windows
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords)
                for index, (kind, keywords) in enumerate(zip(types, arguments, strict=True))
            ]
        )
        self.merged = [layer for layer in self.layers if isinstance(layer, OwnLayer)]
        # The ids `generate` passed last and the position of the first, where they are known to be what the rows hold.
        self.text: tuple[int, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values. Raises KVProfileError if the layer before was not attended by us."""
        # Traced, the marks on the keys would be lost: this ends the trace, and the model runs uncompiled.
        if torch.compiler.is_compiling():
            raise KVProfileError(
                "a merged cache changes its shapes as it merges and cannot be compiled; generate with the model itself, not "
                "with torch.compile of it"
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, OwnLayer):
            # Layers are updated in turn: those before this one have seen this forward's tokens, those after have not. The
            # first to be updated must find all of them level, or an earlier forward did not come to its end.
            place = self.merged.index(layer)
            uneven = not place and any(
                other.get_seq_length() != layer.get_seq_length() or other.turns.waiting for other in self.merged
            )
            if (
                not self.attachment.active
                or uneven
                or self.merged[place - 1].turns.unattended
                or layer.turns.unattended
            ):
                raise KVProfileError(
                    "a merged cache was used with a model that is not attached (or was detached, or failed half-way in an "
                    "earlier forward); call merger.attach(model) and start with a new merger.cache()"
                )
            if not place:
                self._warn_once(layer.get_seq_length() + key_states.shape[2])
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if type(layer) is DynamicSlidingWindowLayer:
            _let_go(layer)
        return stored

    def _warn_once(self, tokens: int) -> None:
        if message := beyond_context(self.longest, tokens, "with these the cache has seen"):
            self.longest = None
            warnings.warn(message, ContextLengthWarning, stacklevel=2)

    @property
    def merges(self) -> bool:
        """True if any head of any layer is to be merged or packed."""
        return not all(layer.setting.keeps_all for layer in self.merged)

    def follow(self, ids: Tensor | None, *, new: int | None, positions: Tensor | None, begins: bool) -> None:
        """Take note of the token ids `(batch, tokens)` of a step of `generate`; None: they are not known.

        The last `new` of them are to be read, all where it is None; `positions` are those the step was given. Only where a
        generation `begins` are the ids compared, once, with those seen before. Raises KVProfileError if they are
        another text's, or would be read twice.
        """
        seen = self.get_seq_length()
        if begins and seen:
            _check_unread(ids, new, positions, seen)
        if ids is None:
            self.text = None
            return
        end = seen + (ids.shape[-1] if new is None else new)
        start = end - ids.shape[-1]
        if begins and self.text is not None:
            first, known = self.text
            low, high = max(start, first), min(seen, first + known.shape[-1])
            old, again = known[:, low - first : high - first], ids[:, low - start : high - start]
            if low < high and len(old) == len(again) and not torch.equal(old, again.to(old.device)):
                raise KVProfileError(
                    f"the {end} tokens passed do not begin with the {seen} this cache has seen, so they are no next turn; "
                    "start another text with a new merger.cache()"
                )
        self.text = start, ids

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens; see `MergedLayer.crop`."""
        super().crop(tokens_to_remove)
        if self.text is not None:
            start, ids = self.text
            self.text = start, ids[:, : max(0, self.get_seq_length() - start)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams. The merged layers ask the device once for all of them."""
        self.text = None
        rows = beam_idx.cpu()
        for layer in self.layers:
            layer.reorder_cache(rows if isinstance(layer, OwnLayer) else beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        self.text = None
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self.text = None
        super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        """Forget everything."""
        self.text = None
        super().reset()

    def adopt(self, recorded: "MergedCache") -> None:
        """Hold the text that `recorded` has read, compressed as this cache's settings say, without reading it again.

        `recorded` is a cache of the same model that kept every token of one forward: `activate_past_recording` was called
        before, and none of its layers has a share of 1 everywhere. It stays as it is. Raises KVProfileError if it has merged.
        """
        for index, (own, other) in enumerate(zip(self.layers, recorded.layers, strict=True)):
            if isinstance(own, OwnLayer):
                own.adopt(other)
            else:
                self.layers[index] = copy.deepcopy(other)

    def slots(self) -> list[list[list[int]]]:
        """Slots stored now: per layer, per batch row, per KV head; stock layers count what they hold."""
        return [
            layer.lengths()
            if isinstance(layer, OwnLayer)
            else [[layer.keys.shape[2]] * layer.keys.shape[1]] * layer.keys.shape[0]
            if getattr(layer, "keys", None) is not None
            else []
            for layer in self.layers
        ]

    def backends(self) -> list[list[str]]:
        """Which back ends serve the next single token: per layer, one for each shelf; `stock` where there is none."""
        return [layer.backends() if isinstance(layer, OwnLayer) else ["stock"] for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes really allocated: keys, values and every side tensor, slack included."""
        return allocated_bytes(self)


def _let_go(layer: DynamicSlidingWindowLayer) -> None:
    """Copy a window that is a small part of what was read: the stock layer holds a whole prompt until the next token comes."""
    keys, values = layer.keys, layer.values
    if keys.untyped_storage().nbytes() > 2 * keys.numel() * keys.itemsize:
        layer.keys, layer.values = keys.clone(), values.clone()


def held_bytes(cache: Cache) -> int:
    """Bytes of the numbers that a stock cache holds: its sliding layers may have a whole prompt allocated for a while."""
    return sum(tensor.numel() * tensor.itemsize for layer in cache.layers for tensor in _tensors(vars(layer)))


def allocated_bytes(cache: Cache) -> int:
    """Bytes of every tensor that a cache holds, merged or stock, counted once where layers share one."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors() if isinstance(layer, OwnLayer) else _tensors(vars(layer)))
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _tensors(held: Any) -> list[Tensor]:
    """Every tensor in the attributes of a stock layer, whatever kind it is."""
    if isinstance(held, Tensor):
        return [held]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _check_unread(ids: Tensor | None, new: int | None, positions: Tensor | None, seen: int) -> None:
    """Raise KVProfileError where `generate` begins to read, after the `seen` tokens, some of these once more."""
    # Of a text that is no longer than what was seen, transformers slices what is new by a negative number, and reads that.
    left = 1 if positions is None else positions.shape[-1]
    if (left if new is None else new) <= 0:
        raise KVProfileError(
            f"no new tokens: the cache has seen {seen} tokens, which is all of the text passed or more; start another text "
            "with a new merger.cache()"
        )
    # Assisted decoding does not slice at all. Where a text is passed without its beginning, there are more positions than ids.
    if (
        new is None
        and ids is not None
        and left == ids.shape[-1]
        and positions is not None
        and not positions[..., 0].any()
    ):
        raise KVProfileError(
            f"assisted decoding would read the {seen} tokens that the cache has seen once more; start with a new "
            "merger.cache(), or go on without an assistant"
        )
