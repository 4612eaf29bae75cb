"""What becomes of the tokens that lose their slots: one small function for every rule a policy can name."""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Join:
    """What becomes of the tokens that lose their slots, and what that needs.

    slots: the function. mass: it reads the attention mass, whatever the combination. combines: it goes by the policy's
    combination; otherwise every slot counts as one token.
    """

    slots: Callable[[Losses, Combination], Slots]
    mass: bool = False
    combines: bool = True

    def __call__(self, losses: Losses, combination: Combination) -> Slots:
        """Make the slots."""
        return self.slots(losses, combination)


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


# The names a policy and a profile can use. Sets of neighbours differ in how they are found (`sets.SET_RULES`).
JOINS: dict[str, Join] = {
    "chain": Join(neighbours),
    "anchor": Join(neighbours),
    "complete": Join(neighbours),
    "drop": Join(drop, combines=False),
    "nearest": Join(nearest),
    "residual": Join(residual),
    "spread": Join(lambda losses, _combination: spread(losses, drawn=False), mass=True, combines=False),
    "spread-drawn": Join(lambda losses, _combination: spread(losses, drawn=True), mass=True, combines=False),
}
