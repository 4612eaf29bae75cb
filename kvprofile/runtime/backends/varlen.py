"""CUDA, half precision: variable-length attention over the slots, every row and KV head a sequence of its own.

The kernel takes no bias. Slots are therefore stored with `EXTRA` more key dimensions: two hold the bias, rounded and the
rest, and the query has 1 / scaling there. Prefix and tail are joined by their log-sum-exps.
"""

from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.slots import Slots
from kvprofile.runtime.backends.tail import hidden_tail, received
from kvprofile.runtime.blocks import MASKED, Blocks

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

EXTRA = 8  # the kernel takes head dimensions in steps of 8
LARGEST = 256
LOGITS = 1 << 24  # logits of the tail alive at a time: many queries are taken in pieces


def unsuited(call: "AttentionCall") -> str | None:
    """Why the kernel cannot serve this layer, in a clause; None if it can."""
    key, value = call.key, call.value
    if key.device.type != "cuda":
        return "the kernel is CUDA's"
    if key.dtype not in (torch.float16, torch.bfloat16):
        return "the kernel takes float16 and bfloat16"
    if call.softcap is not None:
        return "the kernel takes no soft cap"
    dims = key.shape[-1]
    if dims != value.shape[-1] or dims % EXTRA or dims + EXTRA > LARGEST:
        return f"the kernel takes head dimensions in steps of {EXTRA} up to {LARGEST - EXTRA}"
    # The kernel came with an earlier torch, its arguments as used here with this one.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return f"the kernel needs torch 2.13, this is {torch.__version__}"
    capability = torch.cuda.get_device_capability(key.device)
    return None if capability >= (8, 0) else f"the kernel needs capability 8.0, this is {'{}.{}'.format(*capability)}"


def widened(slots: Slots) -> Slots:
    """The slots with their bias in extra key dimensions, and values as wide."""
    rounded = slots.bias.to(slots.keys.dtype)
    rest = (slots.bias - rounded.float()).to(slots.keys.dtype)
    keys = torch.cat([slots.keys, torch.stack([rounded, rest], dim=-1)], dim=-1)
    return Slots(F.pad(keys, (0, EXTRA - 2)), F.pad(slots.values, (0, EXTRA)), slots.bias, slots.lengths)


def varlen_attention(
    call: "AttentionCall", blocks: Blocks, *, padding: Tensor | None, sinks: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ragged_attention`; the slots in the blocks must be `widened`."""
    batch, heads, queries, head_dim = call.query.shape
    kv_heads, tail = call.key.shape[1], call.key.shape[2]
    rows, group = batch * kv_heads, heads // kv_heads
    query = call.query.reshape(rows, group, queries, head_dim)
    marks = query.new_zeros(*query.shape[:-1], EXTRA)
    marks[..., :2] = 1 / call.scaling
    merged, merged_sum = packed_attention(
        torch.cat([query, marks], dim=-1).flatten(0, 2),
        blocks,
        torch.arange(0, rows * group * queries + 1, group * queries, device=call.key.device, dtype=torch.int32),
        blocks.ends,
        blocks.held,
        scaling=call.scaling,
    )
    merged = merged[:, :head_dim].float().view(rows, group, queries, head_dim)
    # The kernel's log-sum-exp of nothing is +inf.
    merged_sum = torch.where(blocks.held[:, None, None] > 0, merged_sum.view(rows, group, queries), MASKED)
    tail_keys, tail_values = call.key.flatten(0, 1).float(), call.value.flatten(0, 1).float()
    outputs, masses = [], []
    piece = max(1, LOGITS // (batch * heads * tail))
    for low in range(0, queries, piece):
        high = min(queries, low + piece)
        asked = query[:, :, low:high].float().flatten(1, 2)
        logits = (asked @ tail_keys.mT).mul_(call.scaling)
        hidden = hidden_tail(call, low, high, padding)
        if hidden is not None:
            logits.view(batch, kv_heads, group, high - low, tail).masked_fill_(hidden[:, None, None], MASKED)
        old_sum = merged_sum[:, :, low:high].flatten(1, 2)
        total = torch.logaddexp(old_sum, logits.logsumexp(-1))
        if sinks is not None:
            aside = sinks.float().view(kv_heads, group, 1).expand(batch, -1, -1, high - low).reshape(total.shape)
            total = torch.logaddexp(total, aside)
        weights = (logits - total[..., None]).exp_()
        old = merged[:, :, low:high].flatten(1, 2) * (old_sum - total).exp_()[..., None]
        outputs.append((old + weights @ tail_values).view(batch, heads, high - low, head_dim))
        if mass:
            masses.append(received(weights, call, low, high, padding))
    whole = torch.cat(outputs, dim=2).transpose(1, 2).contiguous().to(call.value.dtype)
    return whole, reduce(torch.add, masses).view(batch, kv_heads, tail) if mass else None


def packed_attention(
    query: Tensor, blocks: Blocks, query_ends: Tensor, block_ends: Tensor, lengths: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence's queries over its slots: `(queries, dim)` and log-sum-exps `(queries,)`, float32.

    `block_ends` counts the slots that the blocks before have room for, `lengths` the slots that are there.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    output, total = varlen_attn(
        query[:, None],
        blocks.keys.flatten(0, 1)[:, None],
        blocks.values.flatten(0, 1)[:, None],
        query_ends,
        block_ends,
        len(query) // len(blocks.lengths),
        max(blocks.lengths),
        seqused_k=lengths,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
    )
    return output[:, 0], total.flatten()
