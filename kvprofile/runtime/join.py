"""One softmax over what is stored and the unmerged tail: where tail, padding and sinks are joined to what back ends give.

Back ends give attention over pieces of the slots, each with its log-sum-exp (`backends/contract.py`). The tail's logits are
computed here, and all of it is brought to one scale, as FlashInfer's `merge_state` does (arXiv 2501.01005). Many queries are
taken in pieces, so that their logits over the tail stay few. A back end that takes whole layers does all of this itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.merging.host import sent
from kvprofile.runtime.backends.contract import Asked, Pieces, Recent
from kvprofile.runtime.backends.table import BACKENDS
from kvprofile.runtime.blocks import MASKED
from kvprofile.runtime.shelf import Shelf

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

LOGITS = 1 << 20  # logits over the tail alive at a time on a CPU
LOGITS_ON_GPU = 1 << 24  # elsewhere
LEAST = 16  # rows of a product, whatever the logits


def ragged_attention(
    call: "AttentionCall", shelves: Sequence[Shelf], *, unused: list[int] | None = None, mass: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer's queries over its slots and its tail; for inference, no gradient passes through.

    `unused`: of every row of the batch the first columns of the tail that are padding, or of longer rows: nobody sees them.
    Returns the output `(batch, queries, heads, value_dim)` and, with `mass`, the attention the tail received from queries that
    are not padding, `(batch, kv_heads, tail)` float32.
    """
    batch, heads, queries, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    group = heads // kv_heads
    asked = Asked(call.query.reshape(batch * kv_heads, group * queries, head_dim), call.softmax, batch, queries)
    servers = {shelf.server(group * queries) for shelf in shelves}
    whole = BACKENDS[servers.pop()].whole if len(servers) == 1 else None
    if whole is not None:
        return whole(asked, shelves, Recent(call.key, call.value, unused), mass)
    return _of_pieces(call, asked, shelves, _padding(call, unused), mass)


@torch.no_grad()
def _of_pieces(
    call: "AttentionCall", asked: Asked, shelves: Sequence[Shelf], padding: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """The same from pieces of the slots and logits over the tail, by torch's operations.

    `padding` `(batch, tail)` is True where nobody sees the tail.
    """
    batch, heads, queries, _ = call.query.shape
    kv_heads, tail = call.key.shape[1:3]
    group = heads // kv_heads
    stored = _together([shelf.attend(asked) for shelf in shelves])
    keys, values = call.key.flatten(0, 1).float(), call.value.flatten(0, 1).float()
    budget = LOGITS if keys.device.type == "cpu" else LOGITS_ON_GPU
    step = max(budget // (batch * heads * tail), LEAST // group, 1)
    if queries <= step:
        output, given = _joined(asked, asked.scaled, stored, keys, values, _hidden(call, 0, queries, padding))
        output = output.view(batch, heads, queries, -1).transpose(1, 2).contiguous().to(call.value.dtype)
        return output, _received(given, call, 0, queries, padding) if mass else None
    all_output = call.value.new_empty(batch, queries, heads, values.shape[-1])
    masses = keys.new_zeros(batch, kv_heads, tail) if mass else None
    for low in range(0, queries, step):
        high = min(queries, low + step)
        seen = tail - queries + high  # what is newer is hidden from all of them
        query, some = _part(asked.scaled, group, low, high), None
        if stored is not None:
            output, sums = (_part(part, group, low, high) for part in (stored.output, stored.log_sum_exp))
            some = Pieces(output, sums, stored.owner)
        hidden = _hidden(call, low, high, padding)
        output, given = _joined(asked, query, some, keys[:, :seen], values[:, :seen], hidden)
        all_output[:, low:high] = output.view(batch, heads, high - low, -1).transpose(1, 2)
        if masses is not None:
            masses[..., :seen] += _received(given, call, low, high, padding)
    return all_output, masses


def _padding(call: "AttentionCall", unused: list[int] | None) -> Tensor | None:
    """The columns of the tail that nobody sees, `(batch, tail)`."""
    if unused is None:
        return None
    columns = torch.arange(call.key.shape[2], device=call.key.device)
    return columns < sent(unused, call.key.device)[:, None]


def _together(found: list[Pieces]) -> Pieces | None:
    """The pieces of all shelves that hold any."""
    found = [pieces for pieces in found if len(pieces.owner)]
    if len(found) < 2:
        return found[0] if found else None
    parts = ([getattr(pieces, name) for pieces in found] for name in ("output", "log_sum_exp", "owner"))
    return Pieces(*(torch.cat(part) for part in parts))


def _part(rows: Tensor, group: int, low: int, high: int) -> Tensor:
    """Queries `low` to `high` of every group of `(rows, group * queries, width)`."""
    return rows.unflatten(1, (group, -1))[:, :, low:high].flatten(1, 2)


def _joined(  # noqa: PLR0917
    asked: Asked, query: Tensor, stored: Pieces | None, keys: Tensor, values: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries `(rows, asked, head_dim)` over pieces of slots and the tail; changes what the pieces hold.

    Returns the output `(rows, asked, value_dim)` and the weights of the tail `(rows, asked, tail)`.
    """
    softmax = asked.softmax
    recent = softmax.cap_(torch.bmm(query, keys.mT))
    if hidden is not None:
        seen = keys.shape[1]
        recent.view(asked.batch, -1, hidden.shape[1], seen).masked_fill_(hidden[:, None, :, :seen], MASKED)
    # One number per row and query, the last dimension kept.
    largest = recent.amax(-1, keepdim=True)
    if stored is not None:
        owner, weight = stored.owner, stored.log_sum_exp
        largest.scatter_reduce_(0, owner.view(-1, 1, 1).expand_as(weight), weight, "amax")
    if softmax.sinks is not None:
        aside = softmax.sinks.float().view(1, len(query) // asked.batch, -1, 1)
        aside = aside.expand(asked.batch, -1, -1, query.shape[1] // aside.shape[2]).reshape(largest.shape)
        largest = torch.maximum(largest, aside)
    recent.sub_(largest).exp_()
    total = recent.sum(-1, keepdim=True)
    output = torch.bmm(recent, values)
    if stored is not None:
        weight.sub_(largest.index_select(0, owner)).exp_()
        total.index_add_(0, owner, weight)
        output.index_add_(0, owner, stored.output.mul_(weight))
    if softmax.sinks is not None:
        total += (aside - largest).exp_()
    return output.div_(total), recent.div_(total)


def _hidden(call: "AttentionCall", low: int, high: int, padding: Tensor | None) -> Tensor | None:
    """Mark the tail tokens that queries `low` to `high` must not see: `(batch or 1, queries, tail)`; None if there are none.

    The newest query sees the whole tail, so query q sees it up to position q + tail - queries.
    """
    queries, tail = call.query.shape[2], call.key.shape[2]
    hidden = None
    if queries > 1:
        newest = torch.arange(low, high, device=call.key.device) + (tail - queries)
        hidden = (torch.arange(tail, device=call.key.device) > newest[:, None])[None]
    if padding is not None:
        hidden = padding[:, None] if hidden is None else hidden | padding[:, None]
    return hidden


def _received(weights: Tensor, call: "AttentionCall", low: int, high: int, padding: Tensor | None) -> Tensor:
    """Sum the attention `weights` `(rows, group * queries, tail)` of queries `low` to `high` over the queries.

    Padded queries give none. Returns `(batch, kv_heads, tail)`.
    """
    batch, kv_heads, tail = call.key.shape[:3]
    if padding is None:
        return weights.sum(1).view(batch, kv_heads, -1)
    offset = tail - call.query.shape[2]
    asking = ~padding[:, None, None, low + offset : high + offset, None]
    return (weights.view(batch, kv_heads, -1, high - low, weights.shape[-1]) * asking).sum((2, 3))
