"""Attention of a layer with a sliding window, over what of the window is stored packed and over its newest tokens.

Which token a query sees is the model's mask to say, as with the stock cache: window, chunk and padding are all in it. What is
packed is decoded a bounded number of tokens at a time, and many queries are taken in pieces; all pieces share one softmax that
is kept as it goes (FlashAttention, arXiv 2205.14135).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.codecs.rotation import turn, turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.errors import KVProfileError
from kvprofile.merging.host import indexer, selector
from kvprofile.merging.softmax import Softmax
from kvprofile.runtime.blocks import MASKED
from kvprofile.runtime.packed_window import PackedHeads

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

NUMBERS = 1 << 20  # of keys in float32 at a time on a CPU
NUMBERS_ON_GPU = 1 << 24  # elsewhere, where small products leave the device idle
LEAST = 16  # queries at a time, however many keys there are


class _Sums:
    """Numerator `(batch, heads, rows, value_dim)` and denominator of a softmax, in the unit of the largest logit so far."""

    def __init__(self, like: Tensor, value_dim: int) -> None:
        self.top = like.new_full((*like.shape[:3], 1), MASKED)
        self.above = like.new_zeros(*like.shape[:3], value_dim)
        self.below = torch.zeros_like(self.top)

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Take in logits `(batch, heads, rows, tokens)`, which are changed, and values `(batch, heads, tokens, value_dim)`."""
        weights, shrunk = self._weigh(logits)
        self.above.mul_(shrunk).add_(weights @ values)
        self.below.mul_(shrunk).add_(weights.sum(-1, keepdim=True))

    def add_nothing(self, logits: Tensor) -> None:
        """Take in logits that stand for no token."""
        weights, shrunk = self._weigh(logits)
        self.above.mul_(shrunk)
        self.below.mul_(shrunk).add_(weights.sum(-1, keepdim=True))

    def _weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        shrunk, self.top = (self.top - top).exp_(), top
        return logits.sub_(top).exp_(), shrunk


@torch.no_grad()
def window_attention(call: "AttentionCall", packed: Sequence[PackedHeads], seen: int) -> Tensor:
    """The output `(batch, queries, heads, value_dim)` of a call whose keys and values are those of the newest tokens.

    Of the packed tokens the newest `seen` come before these. The mask is over all of them. Inputs are multiplied in float32.
    Raises KVProfileError for a mask of another shape.
    """
    batch, heads, queries, _ = call.query.shape
    kv_heads, tail = call.key.shape[1:3]
    mask = _mask(call, seen + tail)
    query = call.query.unflatten(1, (kv_heads, heads // kv_heads))
    output = call.value.new_empty(batch, kv_heads, heads // kv_heads, queries, call.value.shape[-1])
    sinks = call.softmax.sinks
    if sinks is not None:
        sinks = sinks.float().view(1, kv_heads, -1, 1, 1)
    numbers = NUMBERS if query.device.type == "cpu" else NUMBERS_ON_GPU
    step = max(LEAST, numbers // (batch * heads * max(tail, 1)))
    for part in packed:
        place = indexer(selector(list(part.heads)), query.device)
        keys, values = call.key[:, place].float(), call.value[:, place].float()
        for low in range(0, queries, step):
            here = slice(low, min(queries, low + step))
            asked = query[:, place, :, here].float() * call.softmax.scaling
            sums = _attended(
                asked.flatten(2, 3),
                part,
                (keys, values),
                call.softmax,
                seen=seen,
                mask=None if mask is None else mask[:, :, here],
            )
            if sinks is not None:
                own = sinks[:, place].expand(batch, -1, -1, asked.shape[3], -1).flatten(2, 3)
                sums.add_nothing(own.clone())
            found = sums.above.div_(sums.below)
            output[:, place, :, here] = found.unflatten(2, (-1, asked.shape[3])).to(output.dtype)
    return output.flatten(1, 2).transpose(1, 2).contiguous()


def _attended(
    asked: Tensor,
    part: PackedHeads,
    newest: tuple[Tensor, Tensor],
    softmax: Softmax,
    *,
    seen: int,
    mask: Tensor | None,
) -> _Sums:
    """Queries `(batch, heads, group * queries, head_dim)`, times the scaling, over the packed tokens and the newest."""
    keys, values = newest
    dims = keys.shape[-1], values.shape[-1]
    key_codec, value_codec = (CODECS[name] for name in part.codecs)
    sums = _Sums(asked, dims[1])
    numbers = NUMBERS if asked.device.type == "cpu" else NUMBERS_ON_GPU
    step = max(1, numbers // (asked.shape[0] * asked.shape[1] * max(dims)))
    turned = turn(asked) if key_codec.rotated else asked
    expired = part.tokens - seen
    for low in range(0, seen, step):
        high = min(seen, low + step)
        old_keys, old_values = part.read(slice(expired + low, expired + high), dims)
        logits = softmax.cap_(turned @ old_keys.mT)
        sums.add(_hidden(logits, mask, low, high), old_values)
    if value_codec.rotated:
        sums.above = turn_back(sums.above)
    logits = softmax.cap_(asked @ keys.mT)
    sums.add(_hidden(logits, mask, seen, seen + keys.shape[2]), values)
    return sums


def _hidden(logits: Tensor, mask: Tensor | None, low: int, high: int) -> Tensor:
    """Logits `(batch, heads, group * queries, tokens)` of the tokens `low` to `high`, changed where a query sees none."""
    if mask is None:
        return logits
    split, part = logits.unflatten(2, (-1, mask.shape[2])), mask[:, :, None, :, low:high]
    if mask.dtype == torch.bool:
        split.masked_fill_(~part, MASKED)
    else:
        split.add_(part)
    return logits


def _mask(call: "AttentionCall", tokens: int) -> Tensor | None:
    """The mask `(batch, 1, queries, tokens)`: True where a query sees a token, or what is added; None: all see all.

    Raises KVProfileError for a mask of another shape.
    """
    mask, queries = call.mask, call.query.shape[2]
    if mask is None:
        if queries == 1:
            return None
        places = torch.arange(tokens, device=call.query.device)
        return (places <= places[tokens - queries :, None])[None, None]
    if not isinstance(mask, Tensor) or mask.shape[1:] != (1, queries, tokens):
        raise KVProfileError(
            f"the attention mask of a layer with a sliding window covers {getattr(mask, 'shape', None)}, and {queries} queries "
            f"see {tokens} tokens there; pass a 2D attention_mask, or none"
        )
    return mask.to(call.query.device)
