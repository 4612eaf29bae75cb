"""Any device: slots padded to the longest head and one product for all of them, the mask carrying the bias.

Costs a copy of the slots at every call. Fused attention takes over where nobody asks for the tail's mass.
"""

from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.slots import Slots
from kvprofile.runtime.backends.tail import MASKED, hidden_tail, received

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall

LOGITS = 1 << 26  # logits alive at a time: many queries are taken in blocks


def padded_attention(
    call: "AttentionCall", slots: Slots, *, padding: Tensor | None, sinks: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ragged_attention`."""
    batch, heads, queries = call.query.shape[:3]
    kv_heads, tail = call.key.shape[1], call.key.shape[2]
    group, prefix = heads // kv_heads, max(slots.lengths)
    place, held = _places(slots, call.key.device)
    old_keys, old_values = (
        part[place, : new.shape[-1]].view(batch, kv_heads, prefix, new.shape[-1])
        for part, new in ((slots.keys, call.key), (slots.values, call.value))
    )
    keys, values = torch.cat([old_keys, call.key], dim=2), torch.cat([old_values, call.value], dim=2)
    bias = F.pad(torch.where(held, slots.bias[place], MASKED).view(batch, kv_heads, 1, prefix), (0, tail))
    fused = not mass and sinks is None and call.softcap is None
    outputs, masses = [], []
    block = max(1, LOGITS // (batch * heads * (prefix + tail)))
    for low in range(0, queries, block):
        high = min(queries, low + block)
        hidden = hidden_tail(call, low, high, padding)
        mask = bias if hidden is None else bias + F.pad(hidden.float() * MASKED, (prefix, 0))[:, None]
        mask = mask.expand(batch, kv_heads, high - low, prefix + tail).repeat_interleave(group, dim=1)
        asked = call.query[:, :, low:high]
        if fused:
            # Queries of one group stand in a row, so that keys and values need not be repeated for them.
            packed, packed_mask = (part.reshape(batch, kv_heads, -1, part.shape[-1]) for part in (asked, mask))
            output = F.scaled_dot_product_attention(
                packed,
                keys,
                values,
                attn_mask=packed_mask.to(asked.dtype).clamp_min(torch.finfo(asked.dtype).min),
                scale=call.scaling,
            )
        else:
            output, weights = _attend(asked, keys, values, mask, call, sinks=sinks)
            if mass:
                masses.append(received(weights[..., prefix:].flatten(0, 1), call, low, high, padding))
        outputs.append(output.reshape(batch, heads, high - low, -1))
    whole = torch.cat(outputs, dim=2).transpose(1, 2).contiguous().to(call.value.dtype)
    return whole, reduce(torch.add, masses).view(batch, kv_heads, tail) if mass else None


def _attend(
    asked: Tensor, keys: Tensor, values: Tensor, mask: Tensor, call: "AttentionCall", *, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax by hand: output and weights, `(batch, kv_heads, group * queries, value_dim or keys)`, float32."""
    batch, kv_heads = keys.shape[:2]
    logits = (asked.float().reshape(batch, kv_heads, -1, asked.shape[-1]) @ keys.float().mT).mul_(call.scaling)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits += mask.reshape(logits.shape)
    if sinks is not None:
        aside = sinks.float()[None, :, None].expand(batch, -1, asked.shape[2]).reshape(*logits.shape[:3], 1)
        logits = torch.cat([logits, aside], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : keys.shape[2]]
    return weights @ values.float(), weights


def _places(slots: Slots, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of every head's i-th slot, `(heads * longest,)`, and whether it has that many."""
    lengths = torch.tensor(slots.lengths, device=device)
    index = torch.arange(int(max(slots.lengths)), device=device)
    held = index < lengths[:, None]
    place = torch.where(held, (lengths.cumsum(0) - lengths)[:, None] + index, 0)
    return place.flatten(), held.flatten()
