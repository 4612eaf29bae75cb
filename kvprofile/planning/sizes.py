"""What a cache takes, in bytes: the one place that counts, for plans, for what fits into memory, and for what is told of both.

All that the runtime stores is counted: codes with their scales, every slot's bias, the room in each head's last block, the
keys' means, the newest tokens, which stay as they are, and the columns that wait for more of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kvprofile.names import NO_CODEC
from kvprofile.profile.measured_arrays import UNCENTRED
from kvprofile.profile.schema import ProtectionFacts
from kvprofile.runtime.block_size import RECENT, block_size

Pair = tuple[str, str]
"""A codec of keys and one of values."""

NOTHING: Pair = (NO_CODEC, NO_CODEC)
_BLOCK_FACTS = 12  # bytes of a block: whose it is, and how many slots it holds
_HEAD_FACTS = 16  # bytes of a head on a shelf: where its slots are
_MASS = 4  # bytes of a token of the tail: the attention it received


def recent_tokens(protection: ProtectionFacts, tokens: int) -> int:
    """How many of the newest tokens stay as they are after `tokens`."""
    return min(tokens, max(protection.recent, math.ceil(protection.recent_share * tokens)))


@dataclass(frozen=True)
class Sizes:
    """What a KV head holds after `tokens` tokens.

    head_dim: numbers of a key, and of a value. block: slots of a block. item: bytes of a number that no codec packs. spare:
    columns of the tail beyond the newest tokens, of a merged layer and of a window: none right after a prompt.
    """

    tokens: int
    head_dim: int
    block: int
    item: int = 2
    spare: tuple[int, int] = (0, 0)

    @property
    def stock(self) -> int:
        """Bytes of a token in the stock cache."""
        return 2 * self.item * self.head_dim

    def slot_bytes(self, pair: Pair, *, merged: bool = True) -> float:
        """Bytes of a slot, its part of the block's facts in; packed tokens of which none was merged need no bias."""
        bias = 4 if pair == NOTHING else 2 if merged else 0
        return self._vectors(pair) + bias + _BLOCK_FACTS / self.block

    def layer_bytes(self, heads: Sequence[tuple[float, Pair]], recent: int) -> float:
        """Bytes of a merged layer whose heads have these shares and codecs, to the block."""
        if all(share >= 1 and pair == NOTHING for share, pair in heads):
            return len(heads) * (self.tokens + self.spare[0]) * self.stock
        return sum(self._head_bytes(share, pair, recent) for share, pair in heads)

    def window_bytes(self, window: int, pairs: Sequence[Pair]) -> float:
        """Bytes of a layer that looks back over `window` tokens, its heads stored by these codecs."""
        held = min(self.tokens, window - 1)
        if all(pair == NOTHING for pair in pairs):
            return len(pairs) * (held + bool(self.spare[1])) * self.stock
        newest = min(held, RECENT)
        tail = (newest + self.spare[1]) * self.stock
        return sum((held - newest) * self._vectors(pair) + self._mean(pair) + tail for pair in pairs)

    def slot(self, pair: Pair) -> float:
        """What a slot costs, in tokens of the stock cache."""
        return self.slot_bytes(pair) / self.stock

    def apart(self, pair: Pair, recent: int) -> float:
        """What a head takes besides its share of slots: the newest tokens are no slots, and half a block is empty."""
        slots = recent * (1 - self.slot(pair)) + self.block / 2 * self.slot(pair)
        return (slots + self._facts(pair, recent) / self.stock) / self.tokens

    def head(self, share: float, pair: Pair, recent: int) -> float:
        """The part of the stock cache that a head takes, to the block."""
        return self._head_bytes(share, pair, recent) / (self.tokens * self.stock)

    def _head_bytes(self, share: float, pair: Pair, recent: int) -> float:
        slots = min(max(1, round(share * self.tokens) - recent), self.tokens - recent)
        stored = math.ceil(slots / self.block) * self.block
        slot = self.slot_bytes(pair, merged=share < 1)
        return stored * slot + (recent + self.spare[0]) * self.stock + self._facts(pair, recent)

    def _facts(self, pair: Pair, recent: int) -> float:
        """Bytes that are held once a head: the mean of its keys, the attention its newest tokens received, lengths."""
        return self._mean(pair) + _MASS * recent + _HEAD_FACTS

    def _mean(self, pair: Pair) -> int:
        return 0 if pair[0] in UNCENTRED else 4 * self.head_dim

    def _vectors(self, pair: Pair) -> int:
        return sum(self.item * self.head_dim if codec == NO_CODEC else _packed(codec, self.head_dim) for codec in pair)


def sizes_of(tokens: int, head_dim: int, *, item: int = 2, spare: tuple[int, int] = (0, 0)) -> Sizes:
    """The sizes of heads of a model after so many tokens."""
    return Sizes(tokens, head_dim, block_size(tokens), item, spare)


@lru_cache(maxsize=256)
def _packed(codec: str, dim: int) -> int:
    """Bytes of a vector as a codec stores it."""
    from kvprofile.codecs.table import CODECS

    return CODECS[codec].nbytes(dim)
