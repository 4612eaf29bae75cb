"""What of a sliding window is stored packed: tokens in order, alike in every row, the heads that two codecs store together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.codecs.table import CODECS
from kvprofile.merging.host import indexer, selector

Parts = tuple[Tensor, ...]


@dataclass
class PackedHeads:
    """Tokens of the KV heads `heads`, as a pair of codecs stores them.

    mean `(heads, 1, head_dim)` float32: what is taken off the keys before they are stored; None: nothing. keys, values: the
    codecs' parts, `(batch, heads, tokens, width)` each, the oldest token first.
    """

    codecs: tuple[str, str]
    heads: tuple[int, ...]
    mean: Tensor | None
    keys: Parts = ()
    values: Parts = ()

    @property
    def tokens(self) -> int:
        """How many are stored."""
        return self.keys[0].shape[2] if self.keys else 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Store tokens `(batch, kv_heads, tokens, dim)` of all heads behind those that are there; these stay as they are."""
        place = indexer(selector(list(self.heads)), keys.device)
        coming = (
            CODECS[self.codecs[0]].encode(keys[:, place], self.mean),
            CODECS[self.codecs[1]].encode(values[:, place]),
        )
        # Copies: what a codec passes on as it is may be a part of what was read.
        self.keys, self.values = (
            tuple(torch.cat(pair, dim=2) for pair in zip(held, new, strict=True))
            if held
            else tuple(map(torch.clone, new))
            for held, new in zip((self.keys, self.values), coming, strict=True)
        )

    def keep_newest(self, tokens: int) -> None:
        """Let all but the newest tokens go."""
        first = self.tokens - tokens
        if first > 0:
            self.keys, self.values = (
                tuple(part[:, :, first:].clone() for part in parts) for parts in (self.keys, self.values)
            )

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in that order."""
        self.keys, self.values = (
            tuple(part.index_select(0, rows) for part in parts) for parts in (self.keys, self.values)
        )

    def read(self, part: slice, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens, `(batch, heads, tokens, dim)` float32, turned where their codecs turn."""
        key_codec, value_codec = (CODECS[name] for name in self.codecs)
        keys, values = ([held[:, :, part] for held in parts] for parts in (self.keys, self.values))
        return key_codec.decode(keys, dims[0], self.mean), value_codec.decode(values, dims[1])

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [*self.keys, *self.values, *([] if self.mean is None else [self.mean])]


def tensors_of(packed: Sequence[PackedHeads]) -> list[Tensor]:
    """All that is held of all heads."""
    return [tensor for heads in packed for tensor in heads.tensors()]
