"""Numbers that look drawn at random but follow from a seed, a KV head and a position alone.

A token gets the same number in whatever batch, piece or company it is merged, and nothing has to be remembered.
"""

from typing import TypeVar

import torch
from torch import Tensor

from kvprofile.merging.host import sent
from kvprofile.merging.tokens import Tokens

_WORD = 0xFFFFFFFF
_Word = TypeVar("_Word", int, Tensor)


def uniform(tokens: Tokens, *, salt: int) -> Tensor:
    """One number in [0, 1) for every token of every KV head, `(1, kv_heads, tokens)` float32; equal for all batch rows.

    `salt` tells apart the things one policy draws. Position, head and seed are hashed one after the other by a 32-bit
    integer mixer (Wellons' lowbias32).
    """
    device = tokens.keys.device
    kv_heads, count = tokens.keys.shape[1:3]
    heads = sent(list(tokens.heads or range(kv_heads)), device)
    mixed = _mix(heads ^ _mix((tokens.seed * 16 + salt) & _WORD))[:, None]
    mixed = _mix(mixed ^ (torch.arange(count, device=device) + tokens.position))
    return ((mixed >> 8).float() / 2**24)[None]


def _mix(word: _Word) -> _Word:
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)
