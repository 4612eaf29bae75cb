"""Lost tokens join the most similar survivor: D2O, LOOK-M, KeepKV.

D2O (arXiv 2406.13035), LOOK-M (arXiv 2406.18139) and KeepKV (arXiv 2504.09936) evict by attention and then merge every
evicted pair into the kept one whose key has the largest cosine with its own. They differ in the weights, in the least cosine
and in whether a slot counts for what it holds, all of which the combination says.

Deviations from the published code, common to all: the merge is done once for a piece of text (the prompt, later every 32
tokens) and not token by token, so slots of earlier pieces are not touched again and D2O's moving average of the threshold
is the mean of the piece; protected tokens, which include the recent ones, take nothing in. KeepKV's key is the mean weighted
by attention; the published factor ln(w) that makes one query's output exact is left out, since w is an estimate over many
queries here.

Looking through all survivors would cost as much as a share of attention itself and more on a GPU, where keys are compared in
float32: past 2,048 survivors (a prompt of 4,096 tokens at half its slots) a token chooses from the 2,048 about it in the text.
Keys carry their position, so that similar ones are near: at 8,192 tokens the KL on recall and continuation is that of a search
through all.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.combine import Combination, combine_owned
from kvprofile.merging.losses import Losses
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import mean_attention

BLOCK = 256  # lost tokens at a time: their cosines stay in the cache of a processor
WINDOW = 2048  # receivers a lost token chooses from, those nearest to it in the text


def nearest(losses: Losses, combination: Combination) -> Slots:
    """Every lost token joins the unprotected survivor of the largest cosine, or is dropped below the threshold."""
    tokens, lost = losses.tokens, losses.lost
    best, owner = _most_similar(losses, ~lost & ~losses.protected)
    least: Tensor | float
    if combination.threshold == "mean":
        found = lost & best.isfinite()
        total = best.masked_fill(~found, 0.0).sum(-1, keepdim=True)
        least = total / found.sum(-1, keepdim=True).clamp_min(1)
    else:
        least = float(combination.threshold)
    # Without a survivor to join, the best cosine is -inf.
    joins = best >= least
    own = torch.arange(lost.shape[-1], device=lost.device).expand_as(lost)
    owner = torch.where(lost, torch.where(joins, owner, -1), own)
    received = mean_attention(tokens) if combination.by_attention else None
    return combine_owned(tokens.keys, tokens.values, owner, received, combination, lengths=losses.lengths)


def _most_similar(losses: Losses, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """For every lost token the cosine with the most similar receiver of its head, and which token that is.

    Both `(batch, kv_heads, tokens)`; elsewhere, and where a head has no receiver, the cosine is -inf. Where a head has more
    than `WINDOW` receivers, only those about a token are looked at.
    """
    keys, lost, lengths = losses.tokens.keys, losses.lost, losses.lengths
    # One column more than tokens: what is not asked for is written there.
    best = keys.new_full((*lost.shape[:2], lost.shape[2] + 1), -torch.inf, dtype=torch.float32)
    owner = torch.zeros_like(best, dtype=torch.long)
    asking = _places(lost, lost.shape[-1] - min(lengths))
    offering = _places(receivers, max(0, max(lengths) - losses.first))
    if asking.numel() and offering.numel():
        pairs = _all_pairs if offering.shape[-1] <= WINDOW else _windows
        for places, offered in pairs(lost, asking, receivers, offering):
            similar = _unit(keys, places.clamp_max(lost.shape[2] - 1)) @ _unit(keys, offered).transpose(-1, -2)
            absent = ~receivers.gather(-1, offered)
            found = similar.masked_fill_(absent[:, :, None], -torch.inf).max(-1)
            best.scatter_(-1, places, found.values)
            owner.scatter_(-1, places, offered.gather(-1, found.indices))
    return best[..., :-1].masked_fill(~lost, -torch.inf), owner[..., :-1]


def _all_pairs(_lost: Tensor, asking: Tensor, _receivers: Tensor, offering: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every block of lost tokens with every receiver: places `(batch, kv_heads, block)` and `(batch, kv_heads, receivers)`."""
    for places in asking.split(BLOCK, dim=-1):
        yield places, offering


def _windows(lost: Tensor, asking: Tensor, receivers: Tensor, offering: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every block of lost tokens with the `WINDOW` receivers about its middle, half of them on either side.

    A head's lost tokens are cut into as many blocks as its receivers need for a block to lie between few of them, so that
    the window reaches far to both sides of every token in it. Places beyond a block are one past the last token.
    """
    most = asking.shape[-1]
    blocks = max(-(-most // BLOCK), -(-4 * offering.shape[-1] // WINDOW))
    number, offered = lost.sum(-1, keepdim=True), receivers.sum(-1, keepdim=True)
    before = receivers.long().cumsum(-1)
    step = torch.arange(-(-most // blocks), device=lost.device)
    across = torch.arange(WINDOW, device=lost.device)
    for block in range(blocks):
        begin, end = number * block // blocks, number * (block + 1) // blocks
        places = asking.gather(-1, (begin + step).clamp_max(most - 1))
        middle = asking.gather(-1, ((begin + end) // 2).clamp_max(most - 1))
        first = torch.minimum(before.gather(-1, middle) - WINDOW // 2, offered - WINDOW).clamp_min(0)
        yield torch.where(begin + step < end, places, lost.shape[-1]), offering.gather(-1, first + across)


def _places(marked: Tensor, most: int) -> Tensor:
    """The marked tokens of every head first, `(batch, kv_heads, most)`; heads with fewer are filled up with others."""
    return marked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]


def _unit(keys: Tensor, places: Tensor) -> Tensor:
    """Directions of the keys at the places, float32."""
    rows = keys.gather(2, places[..., None].expand(-1, -1, -1, keys.shape[-1]))
    return F.normalize(rows.float(), dim=-1)
