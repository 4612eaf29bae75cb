"""Attention over merged slots and the unmerged tail under one softmax, by whichever way suits the device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.merging.slots import Slots
from kvprofile.runtime.backends.blockwise import blockwise_attention
from kvprofile.runtime.backends.headwise import FEW, headwise_attention
from kvprofile.runtime.backends.varlen import unsuited, varlen_attention, widened
from kvprofile.runtime.blocks import Blocks

if TYPE_CHECKING:
    from kvprofile.runtime.attention import AttentionCall


@torch.no_grad()
def ragged_attention(
    call: "AttentionCall",
    blocks: Blocks,
    *,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    mass: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer's queries over its slots and its tail; for inference, no gradient passes through.

    `padding` `(batch, tail)` is True where a tail token is padding: nobody sees it. `sinks` `(heads,)` are logits that
    join the softmax and carry no value (GPT-OSS). Returns the output `(batch, queries, heads, value_dim)` and, with
    `mass`, the attention the tail received from queries that are not padding, `(batch, kv_heads, tail)` float32.
    """
    if blocks.keys.shape[-1] > call.key.shape[-1]:
        attend = varlen_attention
    else:
        asked = call.query.shape[1] // call.key.shape[1] * call.query.shape[2]
        attend = blockwise_attention if asked <= FEW else headwise_attention
    return attend(call, blocks, padding=padding, sinks=sinks, mass=mass)


def suited(slots: Slots, call: "AttentionCall") -> Slots:
    """The slots as the back end of the call's layer reads them."""
    return widened(slots) if unsuited(call) is None else slots
