"""Lost tokens share a few residual slots: ZeroMerge, later named ZSMerge (arXiv 2503.10714)."""

import torch

from kvprofile.merging.combine import Combination, combine_owned
from kvprofile.merging.losses import Losses, most_affine
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import mean_attention

RESIDUAL_SHARE = 0.1  # of the unprotected survivors' slots


def residual(losses: Losses, combination: Combination) -> Slots:
    """A tenth of the survivors' slots hold all that is lost, in runs of the text.

    With R residual slots, the lost tokens and the R survivors that would be next to go are put in the order of the text and
    cut into R parts of equal number; every part becomes one slot. ZSMerge averages a part and adds log(count) to the slot's
    logits, as its published prefill does.

    Deviations: the published number of residual slots is an option (one by default); a later token joins the residual
    slot of the largest dot product there, while here every piece of 32 tokens makes residual slots of its own.
    """
    lost = losses.lost
    open_ = ~losses.protected
    losing = lost.sum(-1)
    survivors = (open_ & ~lost).sum(-1)
    slots = (survivors * RESIDUAL_SHARE).ceil().long() * (losing > 0)
    # What was lost already comes first: the R next to go follow.
    affinity = losses.affinity.nan_to_num(neginf=torch.finfo(losses.affinity.dtype).min).masked_fill(lost, torch.inf)
    pool = most_affine(affinity, open_, losing + slots) & (slots > 0)[..., None]

    number = pool.sum(-1, keepdim=True)
    parts = slots[..., None].clamp_min(1)
    size, longer = number // parts, number % parts
    border = longer * (size + 1)
    place = pool.long().cumsum(-1) - 1
    short = size.clamp_min(1)
    part = torch.where(place < border, place // (size + 1), longer + (place - border) // short)
    head = torch.where(part < longer, part * (size + 1), border + (part - longer) * short)
    own = torch.arange(lost.shape[-1], device=lost.device).expand_as(lost)
    # The token of every place in the pool; what is not in the pool is written beside it.
    tokens = torch.zeros(*lost.shape[:-1], lost.shape[-1] + 1, dtype=torch.long, device=lost.device)
    tokens.scatter_(-1, torch.where(pool, place, lost.shape[-1]), own)
    owner = torch.where(pool, tokens.gather(-1, head.clamp(0, lost.shape[-1])), torch.where(lost, -1, own))
    received = mean_attention(losses.tokens) if combination.by_attention else None
    return combine_owned(losses.tokens.keys, losses.tokens.values, owner, received, combination, lengths=losses.lengths)
