"""CUDA, half precision: variable-length attention over the slots, every row and KV head a sequence of its own.

The kernel takes no bias. It is given keys with `EXTRA` more dimensions: two hold the bias, rounded and the rest, and the query
has 1 / scaling there. Where no other back end serves single tokens slots are stored so; else they are copied so for a call,
which many queries share.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.runtime.backends.contract import Asked, Facts, Pieces
from kvprofile.runtime.blocks import MASKED, Blocks

if TYPE_CHECKING:
    from kvprofile.runtime.shelf import Shelf

EXTRA = 8  # the kernel takes head dimensions in steps of 8
LARGEST = 256
LEAST = -30_000.0  # a bias that all half precisions hold; where no slot is the kernel does not look


def unsuited(facts: Facts) -> str | None:
    """Why the kernel cannot serve a shelf, in a clause; None if it can."""
    if facts.device.type != "cuda":
        return "the kernel is CUDA's"
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return "the kernel takes float16 and bfloat16"
    if facts.codecs != ("none", "none"):
        return "the kernel reads no packed slots"
    if facts.capped:
        return "the kernel takes no soft cap"
    dims = facts.head_dim
    if dims != facts.value_dim or dims % EXTRA or dims + EXTRA > LARGEST:
        return f"the kernel takes head dimensions in steps of {EXTRA} up to {LARGEST - EXTRA}"
    # The kernel came with an earlier torch, its arguments as used here with this one.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return f"the kernel needs torch 2.13, this is {torch.__version__}"
    capability = torch.cuda.get_device_capability(facts.device)
    return None if capability >= (8, 0) else f"the kernel needs capability 8.0, this is {'{}.{}'.format(*capability)}"


def marked(keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `(slots, dim)` with `EXTRA` dimensions more, in which the keys hold the bias `(slots,)`."""
    rounded = bias.to(keys.dtype)
    rest = (bias - rounded.float()).to(keys.dtype)
    keys = torch.cat([keys, torch.stack([rounded, rest], dim=-1)], dim=-1)
    return F.pad(keys, (0, EXTRA - 2)), F.pad(values, (0, EXTRA))


def varlen_attention(asked: Asked, shelf: "Shelf") -> Pieces:
    """See `contract.Backend`. Every head is a piece, those without slots too."""
    rows, count, head_dim = asked.query.shape
    marks = asked.query.new_zeros(rows, count, EXTRA)
    marks[..., :2] = 1 / asked.softmax.scaling
    blocks = _with_marks(shelf)
    device, held = asked.query.device, blocks.held
    output, total = packed_attention(
        torch.cat([asked.query, marks], dim=-1).flatten(0, 1),
        blocks,
        torch.arange(0, rows * count + 1, count, device=device, dtype=torch.int32),
        blocks.ends,
        held,
        scaling=asked.softmax.scaling,
    )
    output = output[:, :head_dim].float().view(rows, count, head_dim)
    # The kernel's log-sum-exp of nothing is +inf.
    total = torch.where(held[:, None, None] > 0, total.view(rows, count, 1), MASKED)
    return Pieces(output, total, torch.arange(rows, device=device))


def _with_marks(shelf: "Shelf") -> Blocks:
    """The shelf's blocks, marked for this call where they are not stored so."""
    blocks = shelf.blocks
    if blocks.keys[0].shape[-1] > shelf.facts.head_dim:
        return blocks
    bias = shelf.bias().flatten().clamp_min(LEAST)
    parts = marked(blocks.keys[0].flatten(0, 1), blocks.values[0].flatten(0, 1), bias)
    keys, values = (part.unflatten(0, (-1, blocks.size)) for part in parts)
    return replace(blocks, keys=(keys,), values=(values,))


def packed_attention(
    query: Tensor, blocks: Blocks, query_ends: Tensor, block_ends: Tensor, lengths: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence's queries over its slots: `(queries, dim)` and log-sum-exps `(queries,)`, float32.

    `block_ends` counts the slots that the blocks before have room for, `lengths` the slots that are there.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    output, total = varlen_attn(
        query[:, None],
        blocks.keys[0].flatten(0, 1)[:, None],
        blocks.values[0].flatten(0, 1)[:, None],
        query_ends,
        block_ends,
        len(query) // len(blocks.lengths),
        max(blocks.lengths),
        seqused_k=lengths,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
    )
    return output[:, 0], total.flatten()
