"""The value of a lost token is spread over the survivors after it: CaM (ICML 2024, openreview.net/forum?id=LCTmppB165)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.draws import uniform
from kvprofile.merging.host import places_of
from kvprofile.merging.losses import Losses
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import measured

RECEIVERS = 32


def spread(losses: Losses, *, drawn: bool) -> Slots:
    """v_j += M v_i / m for the m = 32 unprotected survivors j that follow the lost token i; keys are only dropped.

    M is 1 with probability p = clamp(A_i / mean of A_j, 0, 1), A the attention mass, the mean over the same survivors.
    `drawn`: M is drawn by the policy's seed, as published; otherwise M = p, its expectation.

    Deviations: the recent tokens, which stay outside, take nothing in, so near the end of the text fewer than m receive; all
    lost tokens of a piece of text are merged at once, not one by one as they are evicted.
    """
    tokens, lost = losses.tokens, losses.lost
    receivers = ~lost & ~losses.protected
    number = receivers.sum(-1, keepdim=True)
    width = max(1, max(losses.lengths) - losses.first)
    after = receivers.long().cumsum(-1)  # how many receivers lie before a lost token: the place of the next one
    values = tokens.values.float()

    places = torch.where(receivers, after - 1, width)
    mass = measured(tokens.mass)
    ranked = mass.new_zeros(*lost.shape[:-1], width + 1).scatter_(-1, places, mass)[..., :width]
    filled = (torch.arange(width, device=lost.device) < number).to(mass.dtype)
    mean = _ahead(ranked) / _ahead(filled).clamp_min(1)
    following = torch.minimum(after, number - 1).clamp_min(0)
    chance = (mass / mean.gather(-1, following).clamp_min(1e-30)).clamp(0, 1) * (lost & (after < number))
    if drawn:
        chance = (uniform(tokens, salt=1) < chance).float()

    given = (values * (chance / RECEIVERS)[..., None]).flatten(0, 1)
    started = values.new_zeros(len(given), width, values.shape[-1])
    started.scatter_add_(1, following.flatten(0, 1)[..., None].expand_as(given), given)
    # What receiver j gets was started at one of the m receivers up to j.
    taken = F.avg_pool1d(F.pad(started.transpose(1, 2), (RECEIVERS - 1, 0)), RECEIVERS, stride=1) * RECEIVERS
    taken = taken.transpose(1, 2).unflatten(0, lost.shape[:2])
    index = (after - 1).clamp_min(0)[..., None].expand_as(values)
    merged = torch.where(receivers[..., None], values + taken.gather(2, index), values).to(tokens.values.dtype)
    kept = places_of(~lost, sum(losses.lengths))
    keys, merged = (part.flatten(0, 2).index_select(0, kept) for part in (tokens.keys, merged))
    return Slots(keys, merged, torch.zeros(len(kept), device=lost.device), losses.lengths)


def _ahead(row: Tensor) -> Tensor:
    """Sum of an entry and the m - 1 after it: `(batch, kv_heads, receivers)`."""
    return F.avg_pool1d(F.pad(row, (0, RECEIVERS - 1)), RECEIVERS, stride=1) * RECEIVERS
