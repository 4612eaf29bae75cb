"""CPU: two products per batch row and KV head over its own slots, one for all tails, one softmax for all heads.

Nothing is padded or copied but the logits. The queries of a group share one read of their head's keys and values.
"""

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.merging.slots import Slots
from kvprofile.runtime.backends.tail import MASKED, hidden_tail, received

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

LOGITS = 1 << 23  # logits alive at a time: many queries are taken in blocks
FEW = 8  # queries of a decode step: one for every head of a group


def per_head_attention(
    call: "AttentionCall", slots: Slots, *, padding: Tensor | None, sinks: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ragged_attention`. Half-precision inputs are multiplied in float32."""
    batch, heads, queries, head_dim = call.query.shape
    kv_heads, tail = call.key.shape[1], call.key.shape[2]
    rows, prefix = batch * kv_heads, max(slots.lengths)
    query = (call.query.float() * call.scaling).reshape(rows, heads // kv_heads, queries, head_dim)
    tail_keys, tail_values = call.key.flatten(0, 1).float(), call.value.flatten(0, 1).float()
    outputs, masses = [], []
    block = max(1, LOGITS // (batch * heads * (prefix + tail)))
    for low in range(0, queries, block):
        high = min(queries, low + block)
        asked = query[:, :, low:high].flatten(1, 2)
        # Heads with fewer slots leave columns over, which stay masked.
        logits = asked.new_full((rows, asked.shape[1], prefix + tail + (sinks is not None)), MASKED)
        recent = logits.narrow(2, prefix, tail)
        torch.bmm(asked, tail_keys.mT, out=recent)
        own = [row.narrow(1, 0, length) for row, length in zip(logits.unbind(), slots.lengths, strict=True)]
        for one, cells, (keys, _, bias) in zip(asked.unbind(), own, slots.heads, strict=True):
            if call.softcap is not None:
                torch.mm(one, keys.float().T, out=cells)
                _cap(cells, call.softcap).add_(bias)
            elif len(one) > FEW:
                torch.addmm(bias, one, keys.float().T, out=cells)
            else:
                # A tall product is up to a third faster than a flat one.
                torch.add(torch.mm(keys.float(), one.T).T, bias, out=cells)
        if call.softcap is not None:
            _cap(recent, call.softcap)
        hidden = hidden_tail(call, low, high, padding)
        if hidden is not None:
            recent.view(batch, kv_heads, -1, high - low, tail).masked_fill_(hidden[:, None, None], MASKED)
        if sinks is not None:
            logits.view(batch, heads, high - low, -1)[..., -1] = sinks.float()[:, None]
        torch.softmax(logits, dim=-1, out=logits)
        output = torch.bmm(recent, tail_values)
        for one, weights, (_, values, _) in zip(output.unbind(), own, slots.heads, strict=True):
            one.addmm_(weights, values.float())
        outputs.append(output.view(batch, heads, high - low, -1))
        if mass:
            masses.append(received(recent, call, low, high, padding))
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    whole = whole.transpose(1, 2).contiguous().to(call.value.dtype)
    return whole, reduce(torch.add, masses).view(batch, kv_heads, tail) if mass else None


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return logits.div_(softcap).tanh_().mul_(softcap)
