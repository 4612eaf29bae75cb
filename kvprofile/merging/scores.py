"""Aggregated attention: how much attention every token receives, from a sample of the queries.

The pivot of a set and the protected heavy hitters are chosen by it. Summing over every query costs more than the prefill's
own attention; every n-th query keeps the ranking nearly unchanged at a fraction of the cost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.softmax import Softmax

QUERY_BLOCK = 16  # logits of so many stay in the cache of a processor
MASS_STRIDE = 16  # the default estimate of the mass takes every 16th query
MOST_ASKED = 512  # and of many queries so many, or the estimate would remain a fixed share of attention's cost
POOL = 5  # neighbours over which the newest queries' attention is pooled


def mass_stride(queries: int) -> int:
    """The default estimate of the mass takes every so many-th of the queries."""
    return max(MASS_STRIDE, -(-queries // MOST_ASKED))


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    softmax: Softmax,
    *,
    stride: int = 1,
) -> Tensor:
    """Sum of the attention each key receives over every `stride`-th query and over the query heads of its group.

    `query` is `(batch, heads, queries, head_dim)`, `key` `(batch, kv_heads, tokens, head_dim)`; the queries are the newest
    `queries` of the tokens and attention is causal. Returns float32 `(batch, kv_heads, tokens)`, scaled up to
    estimate the sum over all queries. The newest query is always among those taken.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    offset = tokens - queries
    # Evenly spaced, the newest among them: a view, and all sizes are known without asking the device.
    asked = range((queries - 1) % stride, queries, stride)
    mass = torch.zeros(batch, kv_heads, tokens, device=query.device)
    for low in range(0, len(asked), QUERY_BLOCK):
        block = asked[low : low + QUERY_BLOCK]
        first, seen = block[0] + offset, block[-1] + offset + 1
        chosen = query[:, :, block[0] : block[-1] + 1 : stride].reshape(batch, kv_heads, -1, head_dim)
        logits = softmax.cap_((chosen @ key[:, :, :seen].transpose(-1, -2)).float().mul_(softmax.scaling))
        # Only tokens newer than the block's oldest query are hidden from some of its queries.
        own = torch.arange(first, seen, stride, device=query.device)
        hidden = torch.arange(first, seen, device=query.device) > own[:, None]
        newer = logits.view(batch, kv_heads, heads // kv_heads, len(block), seen)[..., first:]
        newer.masked_fill_(hidden, -torch.inf)
        if softmax.sinks is not None:
            aside = (
                softmax.sinks.float().repeat_interleave(len(block)).view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1)
            )
            logits = torch.cat([logits, aside], dim=-1)
        mass[..., :seen] += torch.softmax(logits, -1, out=logits)[..., :seen].sum(2)
    return mass.mul_(queries / len(asked))


def estimated_mass(query: Tensor, key: Tensor, softmax: Softmax) -> Tensor:
    """The default estimate of `attention_mass`: from every so many-th of the queries."""
    return attention_mass(query, key, softmax, stride=mass_stride(query.shape[2]))


def window_mass(
    query: Tensor,
    key: Tensor,
    softmax: Softmax,
    *,
    window: int,
) -> Tensor:
    """Attention received from the newest `window` queries, averaged over `POOL` neighbours (SnapKV, arXiv 2404.14469).

    Shapes as in `attention_mass`.
    """
    return pooled(attention_mass(query[:, :, -window:], key, softmax))


def pooled(received: Tensor) -> Tensor:
    """Average over `POOL` neighbouring tokens: `(batch, kv_heads, tokens)`."""
    return F.avg_pool1d(received, POOL, stride=1, padding=POOL // 2, count_include_pad=False)
