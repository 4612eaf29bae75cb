"""What becomes of the tokens that lose their slots: one small function for every rule a policy can name."""

from collections.abc import Callable

import torch

from kvprofile.merging.combine import Combination, combine, combine_owned
from kvprofile.merging.host import places_of
from kvprofile.merging.losses import Losses
from kvprofile.merging.nearest import nearest
from kvprofile.merging.residual import residual
from kvprofile.merging.slots import Slots
from kvprofile.merging.spread import spread
from kvprofile.merging.strain import owners
from kvprofile.merging.tokens import mean_attention

Join = Callable[[Losses, Combination], Slots]


def drop(losses: Losses, _combination: Combination) -> Slots:
    """Lost tokens are evicted."""
    tokens = losses.tokens
    kept = places_of(~losses.lost, sum(losses.lengths))
    keys, values = (part.flatten(0, 2).index_select(0, kept) for part in (tokens.keys, tokens.values))
    return Slots(keys, values, torch.zeros(len(keys), device=keys.device), losses.lengths)


def neighbours(losses: Losses, combination: Combination) -> Slots:
    """Lost tokens join the set of the token before them; the heaviest of a set is its pivot."""
    tokens = losses.tokens
    received = mean_attention(tokens) if combination.by_attention else tokens.mass if combination.has_pivot else None
    keys, values, lengths = tokens.keys, tokens.values, losses.lengths
    if losses.strained:
        owner = owners(losses.lost, losses.protected)
        return combine_owned(keys, values, owner, received, combination, lengths=lengths, heaviest=received)
    return combine(keys, values, ~losses.lost, received, combination, lengths=lengths)


# The names a policy and a profile can use. Sets of neighbours differ in how they are found (`sets.RULES`).
JOINS: dict[str, Join] = {
    "chain": neighbours,
    "anchor": neighbours,
    "complete": neighbours,
    "drop": drop,
    "nearest": nearest,
    "residual": residual,
    "spread": lambda losses, _combination: spread(losses, drawn=False),
    "spread-drawn": lambda losses, _combination: spread(losses, drawn=True),
}
