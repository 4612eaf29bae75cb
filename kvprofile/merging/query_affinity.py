"""Affinities made from the newest queries themselves, where attention received from each of them apart is needed.

The queries of the prompt are there once, when it is compressed. Tokens of later pieces go by the attention they received
while they were recent.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvprofile.merging.tokens import Tokens, mean_attention, relative

FUTURE_QUERIES = 256
DECAY_QUERIES = 128
DECAY = 0.98
LOGITS = 1 << 22  # logits alive at a time: the queries of long texts are taken in pieces


def expected(tokens: Tokens) -> Tensor:
    """Minus the attention expected from future queries times the length of the value (Expected Attention, arXiv 2510.00636).

    If queries are Gaussian with mean m and covariance S, a key's expected weight is exp(m.k / sqrt d + k'Sk / 2d); a softmax
    over the tokens, the mean over the query heads of the group, times |v|. The published method takes m and S from the queries
    before rotary embedding and rotates them on by the average of the next 512 positions; here they are those of the newest 256
    queries as they were rotated.
    """
    length = tokens.values.float().norm(dim=-1)
    if tokens.queries is None:
        return -relative(mean_attention(tokens) * length)
    states = tokens.queries.newest(FUTURE_QUERIES).states
    keys = tokens.keys.float()[:, :, None]
    mean = states.mean(3, keepdim=True)
    centred = states - mean
    covariance = centred.transpose(-1, -2) @ centred / states.shape[3]
    logits = (keys * mean).sum(-1) + ((keys @ covariance) * keys).sum(-1) / 2
    return -relative(torch.softmax(logits, dim=-1).mean(2) * length)


def again(tokens: Tokens) -> Tensor:
    """Minus the attention received from queries of all of the text, asked again after it, times the length of the value.

    KVzip (arXiv 2505.23416) reads the text again to learn what is looked at then. Here its queries are turned on to where it
    ends, which costs no second forward (`tokens.asked_again`).
    """
    length = tokens.values.float().norm(dim=-1)
    queries, count = tokens.again, tokens.keys.shape[2]
    if queries is None:
        return -relative(mean_attention(tokens) * length)
    logits = queries.logits(torch.cat([tokens.keys, queries.keys], dim=2))
    if queries.sinks is not None:
        logits = torch.cat([logits, queries.sinks[None, :, :, None, None].expand(*logits.shape[:-1], 1)], dim=-1)
    received = torch.softmax(logits, dim=-1, out=logits)[..., :count].mean((2, 3))
    return -relative(received * length)


def decayed(tokens: Tokens) -> Tensor:
    """Minus the attention received, each query's counting 0.98 times the next one's (ZSMerge, arXiv 2503.10714).

    Queries older than the newest 128 count less than 0.98^128 = 8% of the newest and are left out.
    """
    if tokens.queries is None:
        return -relative(mean_attention(tokens))
    queries = tokens.queries.newest(DECAY_QUERIES)
    keys = torch.cat([tokens.keys, queries.keys], dim=2)
    count, asked = tokens.keys.shape[2], queries.states.shape[3]
    places = torch.arange(keys.shape[2], device=keys.device) + tokens.position
    own = torch.arange(asked, device=keys.device) + tokens.seen - asked
    share = DECAY ** torch.arange(asked - 1, -1, -1, device=keys.device)
    worth = torch.zeros((*keys.shape[:2], count), device=keys.device)
    piece = max(1, LOGITS // (queries.states[..., 0, 0].numel() * keys.shape[2]))
    for low in range(0, asked, piece):
        part = slice(low, low + piece)
        logits = replace(queries, states=queries.states[..., part, :]).logits(keys)
        # Only the newest tokens are hidden from some of the queries.
        logits[..., -asked:].masked_fill_(places[-asked:] > own[part, None], -torch.inf)
        if queries.sinks is not None:
            sinks = queries.sinks[None, :, :, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        received = torch.softmax(logits, dim=-1, out=logits)[..., :count]
        worth += received.mul_(share[part, None]).sum((2, 3))
    return -relative(worth)
