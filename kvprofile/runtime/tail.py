"""The newest tokens of a layer, dense, with a little slack so that a decoded token costs no copy of everything."""

import torch
from torch import Tensor

from kvprofile.errors import KVProfileError


class Tail:
    """Keys and values of the newest tokens.

    stored: keys and values `(batch, kv_heads, room, dim)`, of which the first `tokens` columns are in use.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """No tokens, of the batch, heads, dtype and device of these keys and values."""
        self.stored = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.tokens = 0

    @property
    def keys(self) -> Tensor:
        """`(batch, kv_heads, tokens, head_dim)`."""
        return self.stored[0].narrow(2, 0, self.tokens)

    @property
    def values(self) -> Tensor:
        """`(batch, kv_heads, tokens, value_dim)`."""
        return self.stored[1].narrow(2, 0, self.tokens)

    def check(self, keys: Tensor) -> None:
        """Raise KVProfileError for keys of another batch, dtype or device."""
        held = self.stored[0]
        if len(keys) != len(held):
            raise KVProfileError(
                f"the cache holds {len(held)} batch rows and was given {len(keys)}; use one merger.cache() for each generation"
            )
        if (keys.dtype, keys.device) != (held.dtype, held.device):
            raise KVProfileError(
                f"the cache holds keys of {held.dtype} on {held.device} and was given {keys.dtype} on {keys.device}; after a "
                "model was moved or cast start with a new merger.cache()"
            )

    def append(self, keys: Tensor, values: Tensor, slack: int) -> None:
        """Put tokens behind those that are there; where that needs more room there is `slack` more than it takes."""
        first, self.tokens = self.tokens, self.tokens + keys.shape[2]
        # A tensor made in inference mode cannot be written to outside of it.
        stale = self.stored[0].is_inference() and not torch.is_inference_mode_enabled()
        if stale or self.tokens > self.stored[0].shape[2]:
            # A prompt is about to be merged or kept: no slack. A growing tail gets some.
            room = self.tokens + (slack if first else 0)
            self.stored = _resized(self.stored[0], first, room), _resized(self.stored[1], first, room)
        for held, new in zip(self.stored, (keys, values), strict=True):
            held.narrow(2, first, self.tokens - first).copy_(new)

    def forget_oldest(self, count: int) -> None:
        """Let the oldest tokens go."""
        # Copies, not slices: a slice would keep the whole prompt's storage alive.
        keys, values = (held[:, :, count : self.tokens].clone() for held in self.stored)
        self.stored = keys, values
        self.tokens -= count

    def take_back(self, count: int) -> None:
        """Let the newest tokens go."""
        self.tokens -= count

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in that order."""
        self.stored = self.stored[0][rows], self.stored[1][rows]


def _resized(old: Tensor, used: int, room: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], room, old.shape[3])
    new[:, :, :used] = old[:, :, :used]
    return new
