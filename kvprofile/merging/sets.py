"""Merging sets: runs of consecutive tokens whose keys are similar (KVMerger, arXiv 2407.08454, section 4.1).

Three readings of the published algorithm, all scanning from the newest token to the oldest:

- *chain*: token j joins if cos(k_j, k_{j+1}) >= epsilon, that is, if it is similar to its newer neighbour;
- *anchor*: token j joins if cos(k_j, k_i) >= epsilon, where i is the newest token of the open set (Fig. 4 of the paper);
- *complete*: token j joins if it is similar to every member of the open set.

A partition is held as `starts`, a bool tensor `(batch, kv_heads, tokens)`: True where a token opens a new set. The number
of sets is `starts.sum(-1)`. Protected tokens always stand alone.

Anchor and complete look at pairs further apart than neighbours. Only similarities within a band of `MAX_SET - 1` tokens
are computed, so a set of those two rules holds at most `MAX_SET` tokens; chains have no such limit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SET_RULES = ("chain", "anchor", "complete")
MAX_SET = 64


def adjacent_cosine(keys: Tensor) -> Tensor:
    """Cosine of every token with its newer neighbour.

    `keys` is `(..., tokens, head_dim)`; the result `(..., tokens - 1)` holds cos(k_t, k_{t+1}) at index t, in float32.
    """
    unit = F.normalize(keys.float(), dim=-1)
    return (unit[..., :-1, :] * unit[..., 1:, :]).sum(-1)


def mergeable_links(protected: Tensor) -> Tensor:
    """Mark the links (t, t + 1) whose two tokens are both unprotected: `(..., tokens)` -> `(..., tokens - 1)`."""
    return ~(protected[..., :-1] | protected[..., 1:])


def banded_cosine(keys: Tensor, protected: Tensor, band: int = MAX_SET - 1) -> Tensor:
    """Cosine of every token with the `band` tokens before it.

    `keys` is `(..., tokens, head_dim)`, `protected` `(..., tokens)`. The result `(..., tokens, band)` holds
    cos(k_t, k_{t-1-j}) at [t, j], and -inf where there is no such token or one of the two is protected. Computed by block
    products, which is faster than one product per distance.
    """
    unit = F.normalize(keys.float(), dim=-1)
    tokens = unit.shape[-2]
    band = min(band, tokens)
    padded = F.pad(unit, (0, 0, band, 0))
    shut = F.pad(protected, (band, 0), value=True)
    block = 256
    out = unit.new_empty((*unit.shape[:-1], band))
    for low in range(0, tokens, block):
        high = min(tokens, low + block)
        products = unit[..., low:high, :] @ padded[..., low : high + band, :].transpose(-1, -2)
        products.masked_fill_(shut[..., None, low : high + band], -torch.inf)
        # Row r of the block sees the tokens before it at columns r .. r + band - 1; flip so that the nearest comes first.
        windows = products.as_strided(
            (*products.shape[:-2], high - low, band),
            (*products.stride()[:-2], products.stride(-2) + 1, 1),
        )
        out[..., low:high, :] = windows.flip(-1)
    return out.masked_fill_(protected.unsqueeze(-1), -torch.inf)


def oldest_members(rule: str, reach: Tensor) -> Tensor:
    """Return the oldest token of the set whose newest token is t, for every t.

    `reach` `(..., tokens)` counts how many consecutive tokens before t are similar to t. For *anchor* that decides alone.
    For *complete* every token b of the set tolerates no start below b - reach(b); the largest of these bounds over all
    tokens up to t is exactly the start the greedy scan reaches, since bounds of tokens older than it lie below it.
    """
    bound = torch.arange(reach.shape[-1], device=reach.device) - reach
    return bound.cummax(-1).values if rule == "complete" else bound


def starts_from_oldest(oldest: Tensor) -> Tensor:
    """Follow the scan: the newest token closes the first set, the token before its oldest member the next, and so on.

    `oldest` is `(..., tokens)`. Pointer doubling marks every set's newest token in log2(tokens) steps, no loop over
    tokens. Returns `starts`, `(..., tokens)`.
    """
    tokens = oldest.shape[-1]
    sink = tokens  # where chains that have passed the oldest token of all come to rest
    following = torch.where(oldest > 0, oldest - 1, sink)
    following = F.pad(following, (0, 1), value=sink)
    visited = torch.zeros(following.shape, dtype=torch.bool, device=oldest.device)
    visited[..., tokens - 1] = True
    for _ in range(max(1, math.ceil(math.log2(tokens)))):
        visited = visited.scatter(-1, torch.where(visited, following, sink), True)
        following = following.gather(-1, following)
    starts = torch.ones_like(visited[..., :tokens])
    starts[..., 1:] = visited[..., : tokens - 1]
    return starts


def find_sets(keys: Tensor, epsilon: Tensor, rule: str, protected: Tensor) -> Tensor:
    """Partition the tokens of every head at its own threshold.

    `keys` is `(batch, kv_heads, tokens, head_dim)`, `epsilon` `(kv_heads,)` (inf: never merge), `protected`
    `(batch, kv_heads, tokens)`. Returns `starts`, `(batch, kv_heads, tokens)`.
    """
    threshold = epsilon.to(keys.device, torch.float32, non_blocking=True)[None, :, None]
    if rule == "chain":
        joined = (adjacent_cosine(keys) >= threshold) & mergeable_links(protected)
        return F.pad(~joined, (1, 0), value=True)
    if rule not in SET_RULES:
        raise ValueError(f"unknown set rule {rule!r}; expected one of {', '.join(SET_RULES)}")
    similar = banded_cosine(keys, protected) >= threshold[..., None]
    reach = similar.long().cumprod(-1).sum(-1)
    return starts_from_oldest(oldest_members(rule, reach))
