"""What slots take of a cache, in bytes: the unit is what the stock cache of a 16-bit model takes, 2 bytes an element.

All that the runtime stores is counted, at the length that was calibrated with: codes with their scales, every slot's bias, the
room in each head's last block, the keys' means, and the newest tokens, which stay as they are. A plan is exact for a 16-bit
model; a 32-bit model never uses a larger part of its own stock cache.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from kvprofile.names import NO_CODEC
from kvprofile.profile.measured_arrays import UNCENTRED
from kvprofile.profile.schema import ProtectionFacts
from kvprofile.runtime.block_size import RECENT, block_size

Pair = tuple[str, str]
"""A codec of keys and one of values."""

NOTHING: Pair = (NO_CODEC, NO_CODEC)
_ELEMENT = 2  # bytes
_BLOCK_FACTS = 12  # bytes of a block: whose it is, and how many slots it holds
_HEAD_FACTS = 16  # bytes of a head on a shelf: where its slots are


def recent_tokens(protection: ProtectionFacts, tokens: int) -> int:
    """How many of the newest tokens stay as they are after `tokens`."""
    return min(tokens, max(protection.recent, math.ceil(protection.recent_share * tokens)))


@dataclass(frozen=True)
class Sizes:
    """A head after `tokens` tokens, `head_dim` numbers a key and a value; blocks hold `block` slots."""

    tokens: int
    head_dim: int
    block: int

    @property
    def stock(self) -> int:
        """Bytes of a token in a 16-bit cache."""
        return 2 * _ELEMENT * self.head_dim

    def slot(self, pair: Pair) -> float:
        """What a slot costs, in units of a token in a 16-bit cache."""
        vectors = sum(_vector(codec, self.head_dim) for codec in pair)
        return (vectors + (4 if pair == NOTHING else 2) + _BLOCK_FACTS / self.block) / self.stock

    def apart(self, pair: Pair, recent: int) -> float:
        """What a head takes besides its share of slots: the newest tokens are no slots, and half a block is empty."""
        tokens = recent * (1 - self.slot(pair)) + self.block / 2 * self.slot(pair)
        return (tokens + self._facts(pair, recent)) / self.tokens

    def head(self, share: float, pair: Pair, recent: int) -> float:
        """The part of a 16-bit cache that a head takes, to the block."""
        slots = max(0, round(share * self.tokens) - recent)
        stored = math.ceil(slots / self.block) * self.block
        return (stored * self.slot(pair) + recent + self._facts(pair, recent)) / self.tokens

    def window(self, held: int, pair: Pair) -> float:
        """The same of a head that holds a window of so many tokens, the newest as they are."""
        recent = min(held, RECENT)
        vectors = sum(_vector(codec, self.head_dim) for codec in pair)
        mean = 0 if pair[0] in UNCENTRED else 4 * self.head_dim
        return (((held - recent) * vectors + mean) / self.stock + recent) / self.tokens

    def _facts(self, pair: Pair, recent: int) -> float:
        """What is held once a head: the mean of its keys, the attention its newest tokens received, lengths."""
        mean = 0 if pair[0] in UNCENTRED else 4 * self.head_dim
        return (mean + 4 * recent + _HEAD_FACTS) / self.stock


def sizes_of(tokens: int, head_dim: int) -> Sizes:
    """The sizes of heads of a model after so many tokens."""
    return Sizes(tokens, head_dim, block_size(tokens))


@lru_cache(maxsize=256)
def _vector(codec: str, dim: int) -> int:
    """Bytes of a stored vector."""
    if codec == NO_CODEC:
        return _ELEMENT * dim  # told without torch
    from kvprofile.codecs.table import CODECS

    return CODECS[codec].nbytes(dim)
