"""Where protected tokens cut the text into more pieces than there are slots for: how sets of neighbours meet their number.

Every piece between protected tokens needs a slot, so many scattered heavy tokens can leave more sets than were asked for. Then
the pieces are joined over the protected tokens between them, the most alike first, down to one set; and where the protected
tokens leave not even one slot, what is not protected is dropped, as by every other rule. Protected tokens keep their slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.losses import most_affine
from kvprofile.merging.tokens import Tokens


def may_strain(count: Tensor, pieces: int, protected: int) -> bool:
    """True if heads with so many protected tokens and pieces between them could have too few slots, `count`, for both."""
    return int(count.min()) < protected + pieces


def give_up_more(tokens: Tokens, lost: Tensor, protected: Tensor, losses: Tensor) -> Tensor:
    """Mark what is lost when `losses` `(batch, kv_heads)` tokens must be, of which `lost` found a neighbour to join.

    `lost` and `protected` are `(batch, kv_heads, tokens)`.
    """
    before = _places(~protected).roll(1, dims=-1)
    before[..., 0] = -1
    links = ~protected & F.pad(protected[..., :-1], (1, 0)) & (before >= 0)
    unit = F.normalize(tokens.keys.float(), dim=-1)
    older = unit.gather(2, before.clamp_min(0)[..., None].expand_as(unit))
    lost = lost | most_affine((unit * older).sum(-1), links, losses - lost.sum(-1))
    return lost | (~protected & (losses > lost.sum(-1))[..., None])


def owners(lost: Tensor, protected: Tensor) -> Tensor:
    """The token that opened the set of every token, itself for protected ones; -1 where the set has lost its slot."""
    own = torch.arange(lost.shape[-1], device=lost.device).expand_as(lost)
    return torch.where(lost, _places(~lost & ~protected), own)


def _places(marked: Tensor) -> Tensor:
    """The newest marked token up to every token, `(batch, kv_heads, tokens)`; -1 where there is none."""
    own = torch.arange(marked.shape[-1], device=marked.device)
    return torch.where(marked, own, -1).cummax(-1).values
