"""Aggregated attention: how much attention every token receives, from a sample of the queries.

The pivot of a set and the protected heavy hitters are chosen by it. Summing over every query costs more than the prefill's
own attention; every n-th query keeps the ranking nearly unchanged at a fraction of the cost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 64
MASS_STRIDE = 16  # the default estimate of the mass takes every 16th query
POOL = 5  # neighbours over which the newest queries' attention is pooled


def attention_mass(
    query: Tensor, key: Tensor, scaling: float, *, stride: int = 1, softcap: float | None = None
) -> Tensor:
    """Sum of the attention each key receives over every `stride`-th query and over the query heads of its group.

    `query` is `(batch, heads, queries, head_dim)`, `key` `(batch, kv_heads, tokens, head_dim)`; the queries are the newest
    `queries` of the tokens and attention is causal. Returns float32 `(batch, kv_heads, tokens)`, scaled up to
    estimate the sum over all queries. The newest query is always among those taken.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    offset = tokens - queries
    positions = torch.arange(queries - 1, -1, -stride, device=query.device).flip(0)
    mass = torch.zeros(batch, kv_heads, tokens, device=query.device)
    key_positions = torch.arange(tokens, device=query.device)
    for block in positions.split(QUERY_BLOCK):
        seen = int(block[-1]) + offset + 1
        chosen = query[:, :, block].reshape(batch, kv_heads, -1, head_dim)
        logits = (chosen @ key[:, :, :seen].transpose(-1, -2)).float().mul_(scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = key_positions[None, :seen] > (block + offset)[:, None]
        logits.view(batch, kv_heads, heads // kv_heads, len(block), seen).masked_fill_(hidden, -torch.inf)
        mass[..., :seen] += torch.softmax(logits, -1).sum(2)
    return mass.mul_(queries / len(positions))


def window_mass(query: Tensor, key: Tensor, scaling: float, *, window: int, softcap: float | None = None) -> Tensor:
    """Attention received from the newest `window` queries, averaged over `POOL` neighbours (SnapKV, arXiv 2404.14469).

    Shapes as in `attention_mass`.
    """
    return pooled(attention_mass(query[:, :, -window:], key, scaling, softcap=softcap))


def pooled(received: Tensor) -> Tensor:
    """Average over `POOL` neighbouring tokens: `(batch, kv_heads, tokens)`."""
    return F.avg_pool1d(received, POOL, stride=1, padding=POOL // 2, count_include_pad=False)
