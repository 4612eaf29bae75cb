"""What our layers answer transformers alike, whatever they store: who reads them, rows, and what they refuse."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvprofile.errors import KVProfileError
from kvprofile.runtime.attachment import Attachment
from kvprofile.runtime.attention import MARK, AttentionCall
from kvprofile.runtime.tail import Tail
from kvprofile.runtime.turns import Turns


class OwnLayer(CacheLayerMixin):
    """One layer of a cache of ours. `newest` and `batch_select_indices` are each kind's own."""

    supports_early_init = False

    def __init__(self, setting: Any, index: int, attachment: Attachment) -> None:
        # Not the mixin's: it sets `keys` and `values`, which are the tail's here.
        self.setting = setting
        self.index = index
        self.attachment = attachment
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.turns = Turns(len(self.attachment.readers[self.index]))
        # transformers' name: while it is set, tokens of the newest forward may be taken back by `crop`.
        self.record_past = False

    def newest(self) -> Tail | None:
        """The tokens that are stored as they came; None until the first keys come."""
        raise NotImplementedError

    @property
    def is_initialized(self) -> bool:
        """True once keys have come."""
        return self.newest() is not None

    @property
    def keys(self) -> Tensor | None:
        """The tail's, `(batch, kv_heads, tail, head_dim)`."""
        tail = self.newest()
        return None if tail is None else tail.keys

    @property
    def values(self) -> Tensor | None:
        """The tail's, `(batch, kv_heads, tail, value_dim)`."""
        tail = self.newest()
        return None if tail is None else tail.values

    def marked(self, keys: Tensor) -> Tensor:
        """The keys of a forward, marked with this layer for our attention function."""
        setattr(keys, MARK, self)
        self.turns.begin()
        return keys

    def check(self, call: AttentionCall) -> None:
        """Raise KVProfileError where attending to the layer would silently give wrong numbers."""
        self.turns.check(call.module, self.attachment.readers[self.index], self.index)
        call.check_gradients()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if (tail := self.newest()) is not None:
            self.batch_select_indices(torch.arange(len(tail.keys)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def activate_past_recording(self) -> None:
        """Store nothing otherwise than it came until `crop` has said how many of the newest tokens stay (assisted decoding)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens, as transformers passes it.

        Raises KVProfileError where they cannot be taken back.
        """
        if tokens_to_remove > 0:
            raise KVProfileError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if self.newest() is not None:
            self.take_back(-tokens_to_remove)

    def take_back(self, tokens: int) -> None:
        """Take back the newest tokens of a layer that holds some."""
        raise NotImplementedError

    def offload(self) -> None:
        """Refuse: offloading is not supported."""
        raise KVProfileError("a merged cache cannot be offloaded; keep it on the model's device")

    prefetch = offload
