"""Any device, a few queries at a time: one product over all blocks of slots, one over all tails, under one softmax per head.

Nothing is padded but a head's last block, and nothing is copied but logits. The queries of a group share one read of their
head's keys and values. Every query's largest logit is found over blocks and tail first, so all terms are on one scale.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.runtime.backends.tail import hidden_tail, received
from kvprofile.runtime.blocks import MASKED, Blocks

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall


def blockwise_attention(
    call: "AttentionCall", blocks: Blocks, *, padding: Tensor | None, sinks: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ragged_attention`. Half-precision inputs are multiplied in float32."""
    batch, heads, queries, head_dim = call.query.shape
    kv_heads, tail = call.key.shape[1], call.key.shape[2]
    rows, group = batch * kv_heads, heads // kv_heads
    query = (call.query.float() * call.scaling).reshape(rows, group, queries, head_dim)
    keys, values, bias, owner = blocks.keys.float(), blocks.values.float(), blocks.bias.unsqueeze(1), blocks.owner
    tail_keys, tail_values = call.key.flatten(0, 1).float(), call.value.flatten(0, 1).float()
    asked = query.flatten(1, 2)
    recent = torch.bmm(asked, tail_keys.mT)
    if call.softcap is None:
        old = torch.baddbmm(bias, asked.index_select(0, owner), keys.mT)
    else:
        _cap(recent, call.softcap)
        old = _cap(torch.bmm(asked.index_select(0, owner), keys.mT), call.softcap).add_(bias)
    hidden = hidden_tail(call, 0, queries, padding)
    if hidden is not None:
        recent.view(batch, kv_heads, -1, queries, tail).masked_fill_(hidden[:, None, None], MASKED)
    # One number per row and query, the last dimension kept.
    largest_old = old.amax(-1, keepdim=True)
    largest = recent.amax(-1, keepdim=True)
    largest.scatter_reduce_(0, owner.view(-1, 1, 1).expand_as(largest_old), largest_old, "amax")
    if sinks is not None:
        aside = sinks.float().view(kv_heads, group, 1).expand(batch, -1, -1, queries).reshape(largest.shape)
        largest = torch.maximum(largest, aside)
    old.sub_(largest.index_select(0, owner)).exp_()
    recent.sub_(largest).exp_()
    total = recent.sum(-1, keepdim=True).index_add_(0, owner, old.sum(-1, keepdim=True))
    if sinks is not None:
        total += (aside - largest).exp_()
    output = torch.bmm(recent, tail_values).index_add_(0, owner, torch.bmm(old, values))
    output = output.div_(total).view(batch, heads, queries, -1).transpose(1, 2).contiguous().to(call.value.dtype)
    if not mass:
        return output, None
    return output, received(recent.div_(total), call, 0, queries, padding).view(batch, kv_heads, tail)


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return logits.div_(softcap).tanh_().mul_(softcap)
