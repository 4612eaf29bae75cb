"""Any device, many queries at a time (a prompt read in pieces): every head by itself, over its slots and the tail as one text.

Here logits are what takes memory, not keys: a head's slots and tail are copied side by side, and its queries are taken in
pieces whose logits stay in the cache of a processor.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.runtime.blocks import MASKED, Blocks

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

FEW = 16  # queries of a head, those of its group together, up to which one product over all blocks is faster
LOGITS = 1 << 20  # logits alive at a time on a CPU
LOGITS_ON_GPU = 1 << 24  # elsewhere, where small products leave the device idle
LEAST = 64  # rows of a product, whatever the logits: fewer would leave its units idle


def headwise_attention(
    call: "AttentionCall", blocks: Blocks, *, padding: Tensor | None, sinks: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ragged_attention`. Half-precision inputs are multiplied in float32, one head's at a time."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, tail, value_dim = call.value.shape[1:]
    group = heads // kv_heads
    whole = call.value.new_empty(batch, queries, heads, value_dim)
    masses = torch.zeros(batch, kv_heads, tail, device=call.key.device) if mass else None
    first = 0
    for owner, (length, held) in enumerate(zip(blocks.lengths, blocks.counts().tolist(), strict=True)):
        row, head = divmod(owner, kv_heads)
        own = slice(first, first + held)
        first += held
        _attend(
            call.query[row, head * group : (head + 1) * group],
            torch.cat([blocks.keys[own].flatten(0, 1)[:length], call.key[row, head]]).float(),
            torch.cat([blocks.values[own].flatten(0, 1)[:length], call.value[row, head]]).float(),
            torch.cat([blocks.bias[own].flatten()[:length], blocks.bias.new_zeros(tail)]),
            call,
            padding=None if padding is None else padding[row],
            sinks=None if sinks is None else sinks[head * group : (head + 1) * group].float(),
            output=whole[row, :, head * group : (head + 1) * group].transpose(0, 1),
            mass=None if masses is None else masses[row, head],
        )
    return whole, masses


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    call: "AttentionCall",
    *,
    padding: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    mass: Tensor | None,
) -> None:
    """One head's queries `(group, queries, head_dim)` over its slots and, behind them, the tail.

    The result goes to `output` `(group, queries, value_dim)`, the attention the tail received to `mass` `(tail,)`.
    """
    group, queries, _ = query.shape
    tail = call.key.shape[2]
    slots, older = len(keys) - tail, tail - queries
    budget = LOGITS if keys.device.type == "cpu" else LOGITS_ON_GPU
    piece = max(budget // len(keys), LEAST) // group or 1
    for low in range(0, queries, piece):
        high = min(queries, low + piece)
        seen = slots + older + high  # what is newer is hidden from all of the piece
        asked = query[:, low:high].float().mul(call.scaling).flatten(0, 1)
        logits = _logits(asked, keys[:seen], bias[:seen], call.softcap).view(group, high - low, seen)
        _hide(logits[..., slots:], older + low, padding)
        if sinks is not None:
            aside = sinks[:, None, None].expand(-1, high - low, 1)
            logits = torch.cat([logits, aside], dim=-1)
        weights = torch.softmax(logits, -1, out=logits)[..., :seen]
        output[:, low:high] = (weights.flatten(0, 1) @ values[:seen]).view(group, high - low, -1)
        if mass is not None:
            given = weights[..., slots:]
            if padding is not None:
                given = given * ~padding[older + low : older + high, None]
            mass[: seen - slots] += given.sum((0, 1))


def _logits(asked: Tensor, keys: Tensor, bias: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return torch.addmm(bias, asked, keys.mT)
    return (asked @ keys.mT).div_(softcap).tanh_().mul_(softcap).add_(bias)


def _hide(recent: Tensor, first: int, padding: Tensor | None) -> None:
    """Hide padding and, from every query, the tail tokens after its own, of which the first query's is `first`."""
    queries, seen = recent.shape[1:]
    columns = torch.arange(first + 1, seen, device=recent.device)
    own = torch.arange(first, first + queries, device=recent.device)
    recent[..., first + 1 :].masked_fill_(columns > own[:, None], MASKED)
    if padding is not None:
        recent.masked_fill_(padding[:seen], MASKED)
