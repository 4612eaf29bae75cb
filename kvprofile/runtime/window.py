"""A sliding layer whose window is stored packed, as transformers sees it.

What the stock layer keeps is kept: the newest `window - 1` tokens, alike in every row of a batch. Of these the newest
`RECENT` at least stay as they are, and whenever a chunk more has come the oldest of them are packed behind those that are
packed already, which are never packed again; as many of the oldest then go. A prompt is attended to as it is and packed right
after.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvprofile.errors import KVProfileError
from kvprofile.profile.measured_arrays import UNCENTRED
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.block_size import RECENT
from kvprofile.runtime.own_layer import OwnLayer
from kvprofile.runtime.packed_window import PackedHeads, tensors_of
from kvprofile.runtime.settings import CHUNK
from kvprofile.runtime.tail import Tail
from kvprofile.runtime.window_attention import window_attention
from kvprofile.runtime.window_setting import WindowSetting

SLACK = 8  # columns of the tail: those of 32 tokens would be much of a short window


class PackedWindow(OwnLayer):
    """One sliding layer's cache.

    seen: tokens, padding included. tail: the newest tokens, None until the first keys come; packed: those before them.
    """

    is_sliding = True
    is_croppable = True
    setting: WindowSetting

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0
        self.tail: Tail | None = None
        self.packed: list[PackedHeads] = []

    def newest(self) -> Tail | None:
        """The tokens that are not packed; None until the first keys come."""
        return self.tail

    @property
    def stored(self) -> int:
        """Tokens that are packed."""
        return self.packed[0].tokens if self.packed else 0

    @property
    def held(self) -> int:
        """Tokens of the window that the next query sees besides its own."""
        return min(self.seen, self.setting.window - 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch size, heads, dtype and device from the first keys."""
        self._begin(key_states, value_states)

    def _begin(self, keys: Tensor, values: Tensor) -> Tail:
        means, self.tail = self.setting.key_mean, Tail(keys, values)
        self.packed = [
            PackedHeads(
                pair,
                heads,
                None
                if means is None or pair[0] in UNCENTRED
                else means[list(heads), None].to(keys.device, non_blocking=True),
            )
            for pair, heads in self.setting.groups
        ]
        return self.tail

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the tail and return what of it the mask is over, the key marked with this layer for our attention."""
        tail = self._begin(key_states, value_states) if self.tail is None else self.tail
        tail.check(key_states)
        shown = self.held + key_states.shape[2]
        tail.append(key_states, value_states, SLACK)
        self.seen += key_states.shape[2]
        self.shown = max(0, shown - tail.tokens)
        keys, values = (part[:, :, -shown:] for part in (tail.keys, tail.values))
        return self.marked(keys), values

    def check(self, call: AttentionCall) -> None:
        """Raise KVProfileError where attending to the layer would silently give wrong numbers."""
        super().check(call)
        call.check_inference()

    def attend(self, call: AttentionCall) -> tuple[Tensor, None] | None:
        """Attention over packed tokens and tail; None, for the stock way, while none that is seen is packed."""
        return (window_attention(call, self.packed, self.shown), None) if self.shown else None

    def attended(self, _call: AttentionCall, _output: Tensor, _tail_mass: Tensor | None) -> None:
        """After the layer's last reader, pack what has aged."""
        if self.turns.done() and not self.record_past:
            self._settle()

    def _settle(self) -> None:
        """Pack a chunk that has aged and let go what the window has passed."""
        tail = self.tail
        assert tail is not None
        whole = min(tail.tokens, self.held)
        if whole - RECENT >= CHUNK:
            aged = slice(tail.tokens - whole, tail.tokens - RECENT)
            keys, values = tail.keys[:, :, aged], tail.values[:, :, aged]
            for part in self.packed:
                part.keep_newest(self.held - whole)
                part.add(keys, values)
            tail.forget_oldest(tail.tokens - RECENT)
        elif whole < tail.tokens:
            tail.forget_oldest(tail.tokens - whole)

    def adopt(self, recorded: CacheLayerMixin) -> None:
        """Hold what `recorded`, a layer that keeps the window as it is, has read, as this layer's setting keeps it."""
        if recorded.get_seq_length():
            self._begin(recorded.keys, recorded.values).append(recorded.keys, recorded.values, 0)
            self.seen = recorded.get_seq_length()
            self._settle()

    def lengths(self) -> list[list[int]]:
        """Tokens stored now, per batch row and KV head."""
        if self.tail is None:
            return []
        batch, kv_heads = self.tail.keys.shape[:2]
        return [[self.stored + self.tail.tokens] * kv_heads] * batch

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, side tensors included."""
        return [] if self.tail is None else [*self.tail.stored, *tensors_of(self.packed)]

    def backends(self) -> list[str]:
        """How the next single token is served."""
        return ["window" if self.stored else "stock"]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """The window, as the stock layer says."""
        return self.setting.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the mask is over, and the position of the first, as the stock layer says."""
        return self.held + query_length, self.seen - self.held

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        if self.tail is not None:
            indices = indices.to(self.tail.keys.device, non_blocking=True)
            self.tail.select(indices)
            for part in self.packed:
                part.select(indices)

    def take_back(self, tokens: int) -> None:
        """Take back the newest tokens.

        Raises KVProfileError where some of them are packed, or what the window would show again is gone.
        """
        tail = self.tail
        assert tail is not None  # `crop` asks first
        left = min(self.seen - tokens, self.setting.window - 1)
        if tokens > tail.tokens or self.stored + tail.tokens - tokens < left:
            raise KVProfileError(
                f"cannot take back {tokens} tokens of layer {self.index}: those before them are packed, or have left its "
                f"window of {self.setting.window}; start with a new merger.cache() and read the shorter text"
            )
        tail.take_back(tokens)
        self.seen -= tokens
        self._settle()
