"""One layer of a merged cache: merged slots, a different number for every head, and a short unmerged tail.

`slots` holds the merged tokens, as many for each row and head as it needs; the tail holds the newest tokens, dense, with a
little slack so that a decoded token costs no copy of everything. A prompt is attended to as it is and merged right after the
layer's attention, so prefill is exact and only one layer's full keys and values are alive at a time. While the text grows,
the oldest tokens of the tail are merged whenever a chunk of them has aged.

In a batch padded on the left every row is what it would be alone: padding is neither stored as a slot nor counted. The tail
is then aligned to the right, and the columns before a row's own tokens are hidden.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvprofile.errors import KVProfileError
from kvprofile.merging.host import selector, sent
from kvprofile.runtime.aging import Places, Row, settle
from kvprofile.runtime.attachment import Attachment
from kvprofile.runtime.attention import MARK, AttentionCall
from kvprofile.runtime.backends import ragged_attention
from kvprofile.runtime.blocks import Blocks, select_rows
from kvprofile.runtime.masks import LogicalLength
from kvprofile.runtime.settings import CHUNK, LayerSetting


class MergedLayer(CacheLayerMixin):
    """One full-attention layer's cache."""

    is_sliding = False
    supports_early_init = False
    # The tail, `(batch, kv_heads, room, dim)`, of which the first `self.tail` columns are in use.
    keys: Any
    values: Any

    def __init__(self, setting: LayerSetting, index: int, attachment: Attachment) -> None:
        super().__init__()
        self.setting = setting
        self.index = index
        self.attachment = attachment
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.tail = 0
        self.rows: list[Row] = []
        self.slots: Blocks | None = None
        self.mass: Tensor | None = None
        self.keys = self.values = None
        self.is_initialized = False
        # Modules that have yet to attend in this forward, and what those that have attended did.
        self.waiting = 0
        self.calls: list[tuple[AttentionCall, Tensor | None]] = []
        # transformers' name: while it is set, tokens of the newest forward may be taken back by `crop`.
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch size, heads, dtype and device from the first keys."""
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.rows = [Row(0, 0, (0,) * len(self.setting.policies))] * len(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the tail and return it, the key marked with this layer for our attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.rows):
            raise KVProfileError(
                f"the cache holds {len(self.rows)} batch rows and was given {len(key_states)}; use one merger.cache() for each "
                "generation"
            )
        if (key_states.dtype, key_states.device) != (self.keys.dtype, self.keys.device):
            raise KVProfileError(
                f"the cache holds keys of {self.keys.dtype} on {self.keys.device} and was given {key_states.dtype} on "
                f"{key_states.device}; after a model was moved or cast start with a new merger.cache()"
            )
        self._settle()
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
        self.waiting = len(self.attachment.readers[self.index])
        return keys, values

    @property
    def needs_mass(self) -> bool:
        """True if the attention the tail receives has to be measured."""
        return self.setting.needs_mass or bool(self.setting.windows)

    @property
    def unattended(self) -> bool:
        """True if keys were stored and no module has attended to them since."""
        return self.waiting == len(self.attachment.readers[self.index])

    def check(self, call: AttentionCall) -> None:
        """Raise KVProfileError where attending to the layer would silently give wrong numbers."""
        if not any(call.module is reader for reader in self.attachment.readers[self.index]):
            raise KVProfileError(
                "this cache was made for another model; use the cache() of the merger that is attached to this one"
            )
        if not self.waiting:
            raise KVProfileError(
                f"layer {self.index} was attended to more often in a forward than when the model was attached; a merged cache "
                "cannot follow that, use the stock cache"
            )
        call.check_gradients()
        if self.setting.keeps_all:
            return
        call.check_supported()
        before = self.seen - call.query.shape[2]
        for row, padding in enumerate(call.mask.padding()):
            known = self.rows[row].padding
            # A text that has begun has all its padding behind it.
            if padding == known:
                continue
            if known < before or padding < known:
                raise KVProfileError(
                    f"attention_mask now shows {padding} tokens of padding in row {row}, and {known} before; pass the mask of "
                    "the whole text at every step, or start with a new merger.cache() if this is another text"
                )
            self.rows[row] = replace(self.rows[row], padding=padding)

    def hidden(self) -> Tensor | None:
        """Columns of the tail that are not tokens of their row, `(batch, tail)`; None if all are."""
        unused = [self.tail - self.own(row) for row in self.rows]
        if not any(unused):
            return None
        columns = torch.arange(self.tail, device=self.keys.device)
        return columns < sent(unused, self.keys.device)[:, None]

    def attend(self, _call: AttentionCall) -> None:
        """Merged layers attend by `ragged_attention`, the others in the stock way."""

    def attended(self, call: AttentionCall, output: Tensor, tail_mass: Tensor | None) -> None:
        """Count the attention the tail received and, after the layer's last reader, merge what has aged."""
        self.waiting -= 1
        if self.setting.keeps_all:
            return
        self.calls.append((replace(call, module=None, mask=None), tail_mass))
        if not self.waiting and not self.record_past:
            self._settle()

    def own(self, row: Row) -> int:
        """Tokens of the row's text in the tail: the newest columns."""
        return self.seen - row.padding - row.merged

    def alike(self) -> list[tuple[Row, Places]]:
        """Rows of the batch that stand alike, and where."""
        if all(row == self.rows[0] for row in self.rows):
            return [(self.rows[0], slice(None))]
        places: dict[Row, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row, []).append(place)
        return [(row, selector(found)) for row, found in places.items()]

    def _settle(self) -> None:
        """Let the newest forward count: its tokens stay."""
        calls, self.calls = self.calls, []
        if calls:
            settle(self, calls)

    def lengths(self) -> list[list[int]]:
        """Slots stored now, per batch row and KV head, the row's tail included."""
        if not self.is_initialized:
            return []
        kv_heads = self.keys.shape[1]
        merged = [0] * (len(self.rows) * kv_heads) if self.slots is None else self.slots.lengths
        return [
            [merged[place * kv_heads + head] + self.own(row) for head in range(kv_heads)]
            for place, row in enumerate(self.rows)
        ]

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, side tensors included."""
        parts = [self.keys, self.values, self.mass]
        if self.slots is not None:
            parts += self.slots.tensors()
        for call, tail_mass in self.calls:
            parts += [call.query, call.key, call.value, tail_mass]
        return [part for part in parts if part is not None]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: true positions, never slots."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens seen after this forward; the type tells our mask function to keep the recipe."""
        if not query_length:
            raise KVProfileError(
                f"no new tokens: the cache has seen {self.seen} tokens, which is all of the text passed or more; start another "
                "text with a new merger.cache()"
            )
        return LogicalLength(self.seen + query_length), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        if not self.is_initialized:
            return
        self._settle()
        kv_heads, chosen = self.keys.shape[1], indices.tolist()
        indices = indices.to(self.keys.device, non_blocking=True)
        self.keys, self.values = self.keys[indices], self.values[indices]
        if self.mass is not None:
            self.mass = self.mass[indices]
        if self.slots is not None:
            self.slots = select_rows(self.slots, chosen, kv_heads)
        self.rows = [self.rows[place] for place in chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def activate_past_recording(self) -> None:
        """Merge nothing of a forward until `crop` has said how many of its tokens stay (assisted decoding)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens, as transformers passes it.

        While the past is recorded this leaves no trace. Raises KVProfileError where some of them have been merged.
        """
        if tokens_to_remove > 0:
            raise KVProfileError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized:
            return
        removed = -tokens_to_remove
        most = min(self.own(row) for row in self.rows)
        if removed > most:
            raise KVProfileError(
                f"cannot take back {removed} tokens of a merged cache: all but the newest {most} are merged; start with a new "
                "merger.cache() and read the shorter text"
            )
        self.tail -= removed
        self.seen -= removed
        if removed:
            if self.mass is not None:
                self.mass = self.mass[..., : self.tail].clone()
            self.calls = [self._cropped(call, removed) for call, _ in self.calls if call.query.shape[2] > removed]
        self._settle()

    def _cropped(self, call: AttentionCall, removed: int) -> tuple[AttentionCall, Tensor | None]:
        """The call as if its newest `removed` tokens had never come."""
        query, key, value = (part[:, :, :-removed] for part in (call.query, call.key, call.value))
        call = replace(call, query=query, key=key, value=value)
        if self.slots is None:
            return call, None
        padding, mass = self.hidden(), self.needs_mass
        return call, ragged_attention(call, self.slots, padding=padding, sinks=call.sinks, mass=mass)[1]

    def adopt(self, recorded: "MergedLayer") -> None:
        """Hold what `recorded` has read in one forward with its past recorded, as this layer's setting keeps it."""
        if recorded.slots is not None or any(call.query.shape[2] != recorded.seen for call, _ in recorded.calls):
            raise KVProfileError(
                "only a text read in one forward into a new cache with its past recorded can be handed on; the rest is gone"
            )
        self.keys, self.values = recorded.keys.clone(), recorded.values.clone()
        self.seen, self.tail, self.is_initialized = recorded.seen, recorded.tail, True
        self.rows = [Row(row.padding, 0, (0,) * len(self.setting.policies)) for row in recorded.rows]
        self.calls = [] if self.setting.keeps_all else list(recorded.calls)
        self._settle()

    def offload(self) -> None:
        """Refuse: offloading is not supported."""
        raise KVProfileError("a merged cache cannot be offloaded; keep it on the model's device")

    prefetch = offload


def _resized(old: Tensor, used: int, room: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], room, old.shape[3])
    new[:, :, :used] = old[:, :, :used]
    return new
