"""Affinities made from keys alone: tokens whose keys look like all the others give up their slots first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.tokens import Tokens

SLIDING = 64  # newest tokens of NestedKV's nearest mean


def keydiff(tokens: Tokens) -> Tensor:
    """Cosine with the mean direction of all keys (KeyDiff, arXiv 2504.15364): a = cos(k, mean of k' / |k'|).

    The published method works block by block under a fixed memory; here all tokens at hand are ranked at once.
    """
    unit = F.normalize(tokens.keys.float(), dim=-1)
    return F.cosine_similarity(unit, unit.mean(2, keepdim=True), dim=-1)


def nested(tokens: Tokens) -> Tensor:
    """Minus the anomaly at three time scales (NestedKV, arXiv 2605.26678).

    anomaly_s = 1 - cos(k, mean_s) for the mean key direction of all tokens, of the token's own block of
    clip(tokens / 32, 128, 256), and of the newest 64; their average is weighted by their softmax, so that the largest
    counts most. The published method also mixes the scales by head and moves slots between heads; budgets are the plan's
    affair here.
    """
    unit = F.normalize(tokens.keys.float(), dim=-1)
    count = unit.shape[2]
    size = min(256, max(128, count // 32))
    block = torch.arange(count, device=unit.device) // size
    sums = unit.new_zeros(*unit.shape[:2], (count - 1) // size + 1, unit.shape[3]).index_add_(2, block, unit)
    means = (unit.mean(2, keepdim=True), sums[:, :, block], unit[:, :, -SLIDING:].mean(2, keepdim=True))
    anomaly = torch.stack([1 - F.cosine_similarity(unit, mean, dim=-1) for mean in means])
    return -(anomaly.softmax(0) * anomaly).sum(0)
