"""A merged layer as transformers sees it: what it asks of a cache's layer, answered from the layer's state."""

from typing import Any

from torch import Tensor

from kvprofile.errors import KVProfileError
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.masks import LogicalLength
from kvprofile.runtime.own_layer import OwnLayer
from kvprofile.runtime.settings import LayerSetting
from kvprofile.runtime.state import LayerState
from kvprofile.runtime.tail import Tail


class MergedLayer(OwnLayer):
    """One full-attention layer's cache; state: what it holds, None until the first keys come."""

    is_sliding = False
    setting: LayerSetting

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state: LayerState | None = None

    def newest(self) -> Tail | None:
        """The unmerged tokens; None until the first keys come."""
        return None if self.state is None else self.state.tail

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch size, heads, dtype and device from the first keys."""
        self.state = LayerState(self.setting, key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the tail and return it, the key marked with this layer for our attention function."""
        if self.state is None:
            self.state = LayerState(self.setting, key_states, value_states)
        keys, values = self.state.append(key_states, value_states)
        return self.marked(keys), values

    def check(self, call: AttentionCall) -> None:
        """Raise KVProfileError where attending to the layer would silently give wrong numbers."""
        super().check(call)
        if not self.setting.keeps_all and self.state is not None:
            call.check_supported()
            self.state.see_padding(call.mask.padding(), call.query.shape[2])

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None] | None:
        """Attention over slots and tail; None, for the stock way, while there are no slots."""
        return None if self.state is None else self.state.attend(call)

    def attended(self, call: AttentionCall, output: Tensor, tail_mass: Tensor | None) -> None:
        """Remember what was asked and, after the layer's last reader, merge what has aged."""
        last = self.turns.done()
        if self.setting.keeps_all or self.state is None:
            return
        self.state.attended(call, tail_mass)
        if last and not self.record_past:
            self.state.settle()

    def lengths(self) -> list[list[int]]:
        """Slots stored now, per batch row and KV head, the row's tail included."""
        return [] if self.state is None else self.state.lengths()

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, side tensors included."""
        return [] if self.state is None else self.state.tensors()

    def backends(self) -> list[str]:
        """Which back end serves the next single token, for every shelf; `stock` while there are no slots."""
        shelves = [] if self.state is None else self.state.shelves
        return [shelf.server(shelf.facts.group) for shelf in shelves] or ["stock"]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: true positions, never slots."""
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens seen after this forward; the type tells our mask function to keep the recipe."""
        seen = self.get_seq_length()
        if not query_length:
            raise KVProfileError(
                f"no new tokens: the cache has seen {seen} tokens, which is all of the text passed or more; start another "
                "text with a new merger.cache()"
            )
        return LogicalLength(seen + query_length), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        if self.state is not None:
            self.state.select(indices.tolist(), indices.to(self.state.device, non_blocking=True))

    def take_back(self, tokens: int) -> None:
        """Take back the newest tokens.

        While the past is recorded this leaves no trace. Raises KVProfileError where some of them have been merged.
        """
        assert self.state is not None  # `crop` asks first
        self.state.crop(tokens)

    def adopt(self, recorded: "MergedLayer") -> None:
        """Hold what `recorded` has read in one forward with its past recorded, as this layer's setting keeps it."""
        self.state = None if recorded.state is None else recorded.state.adopted(self.setting)
