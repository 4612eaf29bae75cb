"""What one layer of a merged cache holds, and everything that can happen to it.

Shelves hold the merged tokens, as many slots for each row and head as it needs; the tail holds the newest tokens. A prompt is
attended to as it is and merged right after the layer's attention, so prefill is exact and only one layer's full keys and values
are alive at a time. While the text grows, the oldest tokens of the tail are merged whenever a chunk of them has aged.

In a batch padded on the left every row is what it would be alone: padding is neither stored as a slot nor counted. The tail
is then aligned to the right, and the columns before a row's own tokens are hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvprofile.errors import KVProfileError
from kvprofile.runtime.aging import settle
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.rows import Row
from kvprofile.runtime.settings import CHUNK, LayerSetting
from kvprofile.runtime.shelf import Shelf
from kvprofile.runtime.tail import Tail


class LayerState:
    """Tail, shelves and where the rows stand; begun with the first keys and values.

    seen: tokens, padding included. mass `(batch, kv_heads, tail)`: attention that the tail has received, where a policy asks
    for it. calls: what the layer's readers asked in the newest forward, which may yet be taken back, with the attention that
    the tail received where it is known.
    """

    def __init__(self, setting: LayerSetting, keys: Tensor, values: Tensor) -> None:
        self.setting = setting
        self.seen = 0
        self.tail = Tail(keys, values)
        self.rows = [Row(0, 0, (0,) * len(setting.policies))] * len(keys)
        self.shelves: list[Shelf] = []
        self.mass: Tensor | None = None
        self.calls: list[tuple[AttentionCall, Tensor | None]] = []

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.tail.stored[0].device

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.tail.stored[0].shape[1]

    @property
    def needs_mass(self) -> bool:
        """True if the attention the tail receives has to be measured."""
        return self.setting.needs_mass or bool(self.setting.windows)

    def own(self, row: Row) -> int:
        """Tokens of the row's text in the tail: the newest columns."""
        return self.seen - row.padding - row.merged

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Let the forward before count and take in the tokens of a new one; returns the whole tail."""
        self.tail.check(keys)
        self.settle()
        self.tail.append(keys, values, CHUNK)
        self.seen += keys.shape[2]
        return self.tail.keys, self.tail.values

    def see_padding(self, padding: list[int], queries: int) -> None:
        """Learn how many tokens are padding before every row's text, in a forward of so many tokens.

        Raises KVProfileError where that contradicts what is known.
        """
        before = self.seen - queries
        for place, number in enumerate(padding):
            known = self.rows[place].padding
            # A text that has begun has all its padding behind it.
            if number == known:
                continue
            if known < before or number < known:
                raise KVProfileError(
                    f"attention_mask now shows {number} tokens of padding in row {place}, and {known} before; pass the mask of "
                    "the whole text at every step, or start with a new merger.cache() if this is another text"
                )
            self.rows[place] = replace(self.rows[place], padding=number)

    def unused(self) -> list[int] | None:
        """Columns of the tail before the tokens of every row; None if all rows use all."""
        unused = [self.tail.tokens - self.own(row) for row in self.rows]
        return unused if any(unused) else None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None] | None:
        """Output and, where it is needed, the attention that the tail received; None while there are no slots."""
        if not self.shelves:
            return None
        return ragged_attention(call, self.shelves, unused=self.unused(), mass=self.needs_mass)

    def attended(self, call: AttentionCall, tail_mass: Tensor | None) -> None:
        """Remember what a reader asked, until it is known which of the forward's tokens stay."""
        self.calls.append((call.remembered(), tail_mass))

    def settle(self) -> None:
        """Let the newest forward count: its tokens stay, and what has aged is merged."""
        calls, self.calls = self.calls, []
        if calls:
            settle(self, calls)

    def crop(self, removed: int) -> None:
        """Take back the newest tokens; of a forward that does not count yet this leaves no trace.

        Raises KVProfileError where some of them have been merged.
        """
        most = min(self.own(row) for row in self.rows)
        if removed > most:
            raise KVProfileError(
                f"cannot take back {removed} tokens of a merged cache: all but the newest {most} are merged; start with a new "
                "merger.cache() and read the shorter text"
            )
        self.tail.take_back(removed)
        self.seen -= removed
        if removed:
            if self.mass is not None:
                self.mass = self.mass[..., : self.tail.tokens].clone()
            self.calls = [self._cropped(call, removed) for call, _ in self.calls if call.query.shape[2] > removed]
        self.settle()

    def _cropped(self, call: AttentionCall, removed: int) -> tuple[AttentionCall, Tensor | None]:
        """The call as if its newest `removed` tokens had never come."""
        query, key, value = (part[:, :, :-removed] for part in (call.query, call.key, call.value))
        call = replace(call, query=query, key=key, value=value)
        found = self.attend(call)
        return call, None if found is None else found[1]

    def select(self, rows: list[int], indices: Tensor) -> None:
        """Keep the batch rows `rows`, in that order; `indices` are the same numbers on the device."""
        self.settle()
        self.tail.select(indices)
        if self.mass is not None:
            self.mass = self.mass[indices]
        for shelf in self.shelves:
            shelf.select(rows, self.kv_heads)
        self.rows = [self.rows[place] for place in rows]

    def adopted(self, setting: LayerSetting) -> "LayerState":
        """What this state has read in one forward that does not count yet, as another setting keeps it; this one stays."""
        if self.shelves or any(call.query.shape[2] != self.seen for call, _ in self.calls):
            raise KVProfileError(
                "only a text read in one forward into a new cache with its past recorded can be handed on; the rest is gone"
            )
        state = LayerState(setting, self.tail.keys, self.tail.values)
        state.tail.append(self.tail.keys, self.tail.values, 0)
        state.seen = self.seen
        state.rows = [replace(own, padding=row.padding) for own, row in zip(state.rows, self.rows, strict=True)]
        state.calls = [] if setting.keeps_all else list(self.calls)
        state.settle()
        return state

    def merged_lengths(self) -> list[int]:
        """Slots of every row and head, `batch * kv_heads`, the tail aside."""
        of_shelves = [shelf.blocks.lengths for shelf in self.shelves] or [[0] * (len(self.rows) * self.kv_heads)]
        return [sum(lengths) for lengths in zip(*of_shelves, strict=True)]

    def lengths(self) -> list[list[int]]:
        """Slots stored now, per batch row and KV head, the row's tail included."""
        merged, kv_heads = self.merged_lengths(), self.kv_heads
        return [
            [merged[place * kv_heads + head] + self.own(row) for head in range(kv_heads)]
            for place, row in enumerate(self.rows)
        ]

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds, side tensors included."""
        parts = [*self.tail.stored, self.mass]
        for shelf in self.shelves:
            parts += [*shelf.blocks.tensors(), shelf.mean]
        for call, tail_mass in self.calls:
            parts += [call.query, call.key, call.value, tail_mass]
        return [part for part in parts if part is not None]
