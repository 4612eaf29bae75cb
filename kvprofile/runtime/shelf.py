"""A shelf: one layer's slots of the KV heads that store keys and values in the same way, and how they are read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprofile.codecs.codec import Codec
from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.merging.host import sent
from kvprofile.merging.slots import Slots
from kvprofile.profile.measured_arrays import UNCENTRED
from kvprofile.runtime.backends.contract import Asked, Facts, Pieces
from kvprofile.runtime.backends.table import BACKENDS, able, serving
from kvprofile.runtime.backends.varlen import marked
from kvprofile.runtime.blocks import MASKED, Blocks, Stored, append, empty_blocks, select_rows


@dataclass
class Shelf:
    """Slots in blocks, as two codecs store their keys and values.

    Rows (b, h) are the layer's, b * kv_heads + h; those of heads that are on another shelf hold nothing. servers: the back
    ends that can serve it, by name. mean `(kv_heads, head_dim)` float32: what was taken off the keys before they were stored;
    None: nothing. weighs: False if every slot's bias is zero, and none is stored. plan: what a back end keeps between steps.
    """

    facts: Facts
    servers: list[str]
    mean: Tensor | None
    weighs: bool
    blocks: Blocks = field(init=False)
    plan: Any = field(default=None, init=False, compare=False)

    @property
    def key_codec(self) -> Codec:
        """How keys are stored."""
        return CODECS[self.facts.codecs[0]]

    @property
    def value_codec(self) -> Codec:
        """How values are stored."""
        return CODECS[self.facts.codecs[1]]

    @property
    def ready(self) -> bool:
        """True if reading the slots copies nothing."""
        return all(part.dtype == torch.float32 for part in (*self.blocks.keys, *self.blocks.values))

    def server(self, queries: int) -> str:
        """Which back end serves so many queries of a KV head."""
        return serving(self.servers, queries)

    def attend(self, asked: Asked) -> Pieces:
        """Attention of the layer's queries over the slots."""
        return BACKENDS[self.server(asked.query.shape[1])].attend(asked, self)

    def queries(self, asked: Asked) -> Tensor:
        """The queries `(rows, asked, head_dim)` whose products with the stored keys are the logits, up to `shift` and cap."""
        return asked.turned if self.key_codec.rotated else asked.scaled

    def shift(self, asked: Asked) -> Tensor | None:
        """What the mean that was taken off the keys adds to all logits of a query: `(rows, asked, 1)`, or None."""
        if self.mean is None:
            return None
        kv_heads = len(self.mean)
        mean = self.mean.expand(len(asked.query) // kv_heads, -1, -1).reshape(-1, self.mean.shape[1], 1)
        return torch.bmm(asked.scaled, mean)

    def keys(self, part: slice | None = None) -> Tensor:
        """Keys of some blocks, or of all, `(blocks, size, head_dim)` float32, turned where the codec turns."""
        return _read(self.key_codec, self.blocks.keys, self.facts.head_dim, part)

    def values(self, part: slice | None = None) -> Tensor:
        """Values of some blocks, or of all, `(blocks, size, value_dim)` float32, turned where the codec turns."""
        return _read(self.value_codec, self.blocks.values, self.facts.value_dim, part)

    def bias(self, part: slice | None = None) -> Tensor:
        """What is added to the logits of blocks, `(blocks, size)` float32; `MASKED` or as good where no slot is."""
        bias, filled = self.blocks.bias, self.blocks.filled
        if bias is not None:
            return (bias if part is None else bias[part]).float()
        places = torch.arange(self.blocks.size, device=filled.device)
        room = places >= (filled if part is None else filled[part])[:, None]
        return room * MASKED

    def output(self, output: Tensor) -> Tensor:
        """A sum of the stored values, as a sum of the values themselves."""
        return turn_back(output) if self.value_codec.rotated else output

    def add(self, slots: Slots, rows: list[int]) -> None:
        """Store slots behind those of their rows: the next `slots.lengths[i]` belong to `rows[i]`. What is stored stays."""
        append(self.blocks, self._stored(slots, rows), rows)

    def select(self, rows: list[int], kv_heads: int) -> None:
        """Keep the batch rows `rows`, in that order."""
        self.blocks = select_rows(self.blocks, rows, kv_heads)

    def _stored(self, slots: Slots, rows: list[int]) -> Stored:
        """The slots as they are stored."""
        keys, values, bias = slots.keys, slots.values, None
        if self.mean is not None:
            heads = [
                row % len(self.mean) for row, length in zip(rows, slots.lengths, strict=True) for _ in range(length)
            ]
            keys = keys.float() - self.mean.index_select(0, sent(heads, keys.device))
        if BACKENDS[self.servers[0]].marked:
            keys, values = marked(keys, values, slots.bias)
        if self.weighs:
            bias = slots.bias if self.facts.codecs == ("none", "none") else slots.bias.half()
        return Stored(self.key_codec.encode(keys), self.value_codec.encode(values), bias, slots.lengths)


def _read(codec: Codec, parts: tuple[Tensor, ...], dim: int, part: slice | None) -> Tensor:
    vectors = codec.decode(parts if part is None else [held[part] for held in parts], dim)
    # Slots that were made for the kernel have their bias in more dimensions.
    return vectors if vectors.shape[-1] == dim else vectors[..., :dim]


def empty_shelf(
    like: Slots, facts: Facts, rows: int, size: int, *, backend: str | None, mean: Tensor | None, weighs: bool
) -> Shelf:
    """No slots of `rows` rows in blocks of `size`, to store such as those of `like`.

    Raises KVProfileError if the back end that is asked for cannot serve it.
    """
    mean = None if facts.codecs[0] in UNCENTRED else mean
    shelf = Shelf(facts, able(facts, backend), mean, weighs)
    stored = shelf._stored(Slots(like.keys[:0], like.values[:0], like.bias[:0], []), [])
    shelf.blocks = empty_blocks(stored, rows, size)
    return shelf
