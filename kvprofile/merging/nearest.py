"""Lost tokens join the most similar survivor: D2O, LOOK-M, KeepKV.

D2O (arXiv 2406.13035), LOOK-M (arXiv 2406.18139) and KeepKV (arXiv 2504.09936) evict by attention and then merge every
evicted pair into the kept one whose key has the largest cosine with its own. They differ in the weights, in the least cosine
and in whether a slot counts for what it holds, all of which the combination says.

Deviations from the published code, common to all: the merge is done once for a piece of text (the prompt, later every 32
tokens) and not token by token, so slots of earlier pieces are not touched again and D2O's moving average of the threshold
is the mean of the piece; protected tokens, which include the recent ones, take nothing in. KeepKV's key is the mean weighted
by attention; the published factor ln(w) that makes one query's output exact is left out, since w is an estimate over many
queries here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.combine import Combination, combine_owned
from kvprofile.merging.losses import Losses
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import mean_attention

BLOCK = 256  # lost tokens at a time: their cosines stay in the cache of a processor


def nearest(losses: Losses, combination: Combination) -> Slots:
    """Every lost token joins the unprotected survivor of the largest cosine, or is dropped below the threshold."""
    tokens, lost = losses.tokens, losses.lost
    best, owner = _most_similar(tokens.keys, lost, ~lost & ~losses.protected)
    if combination.threshold == "mean":
        found = lost & best.isfinite()
        total = best.masked_fill(~found, 0.0).sum(-1, keepdim=True)
        least = total / found.sum(-1, keepdim=True).clamp_min(1)
    else:
        least = best.new_tensor(float(combination.threshold))
    # Without a survivor to join, the best cosine is -inf.
    joins = best >= least
    own = torch.arange(lost.shape[-1], device=lost.device).expand_as(lost)
    owner = torch.where(lost, torch.where(joins, owner, -1), own)
    received = mean_attention(tokens) if combination.by_attention else None
    return combine_owned(tokens.keys, tokens.values, owner, received, combination)


def _most_similar(keys: Tensor, lost: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """For every lost token the cosine with the most similar receiver of its head, and which token that is.

    Both `(batch, kv_heads, tokens)`; elsewhere, and where a head has no receiver, the cosine is -inf.
    """
    unit = F.normalize(keys.float(), dim=-1)
    best = unit.new_full(lost.shape, -torch.inf)
    owner = torch.zeros_like(lost, dtype=torch.long)
    asking, offering = _places(lost), _places(receivers)
    if not asking.numel() or not offering.numel():
        return best, owner
    absent = ~receivers.gather(-1, offering)
    offered = _rows(unit, offering).transpose(-1, -2)
    for places in asking.split(BLOCK, dim=-1):
        similar = _rows(unit, places) @ offered
        found = similar.masked_fill_(absent[:, :, None], -torch.inf).max(-1)
        best.scatter_(-1, places, found.values)
        owner.scatter_(-1, places, offering.gather(-1, found.indices))
    return best.masked_fill_(~lost, -torch.inf), owner


def _places(marked: Tensor) -> Tensor:
    """The marked tokens of every head first, `(batch, kv_heads, most)`; heads with fewer are filled up with others."""
    most = int(marked.sum(-1).max())
    return marked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]


def _rows(unit: Tensor, places: Tensor) -> Tensor:
    return unit.gather(2, places[..., None].expand(-1, -1, -1, unit.shape[-1]))
