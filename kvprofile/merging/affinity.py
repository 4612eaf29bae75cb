"""Affinity: how readily a token gives up its slot. The larger, the sooner it is merged or dropped.

Every policy ranks tokens by one of these. An affinity is `(batch, kv_heads, tokens)`; where tokens are merged with their
neighbours, entry t is about joining the set of token t - 1. Affinities made from attention are relative to the mean over
the tokens at hand, so that a threshold means the same at every length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.draws import uniform
from kvprofile.merging.key_affinity import keydiff, nested
from kvprofile.merging.query_affinity import DECAY_QUERIES, FUTURE_QUERIES, again, decayed, expected
from kvprofile.merging.sets import adjacent_cosine
from kvprofile.merging.tokens import Tokens, mean_attention, relative


@dataclass(frozen=True)
class Affinity:
    """A ranking of tokens, and what has to be measured for it.

    rank: the function. mass: it reads the attention mass. window: it reads the attention received from that many of the
    newest queries. queries: it reads that many of the newest queries themselves. again: it reads the queries asked again.
    """

    rank: Callable[[Tokens], Tensor]
    mass: bool = False
    window: int | None = None
    queries: int = 0
    again: bool = False

    def __call__(self, tokens: Tokens) -> Tensor:
        """Rank the tokens: `(batch, kv_heads, tokens)`."""
        return self.rank(tokens)


def cosine(tokens: Tokens) -> Tensor:
    """Cosine with the older neighbour's key (KVMerger, arXiv 2407.08454)."""
    return F.pad(adjacent_cosine(tokens.keys), (1, 0), value=-torch.inf)


def displacement(tokens: Tokens) -> Tensor:
    """Minus the squared distance to the older neighbour's key, weighted by the lighter one's attention mass.

    What merging two neighbours into the heavier one's key moves, times how much it is looked at.
    """
    keys, mass = tokens.keys.float(), relative(tokens.mass)
    squared = (keys[..., 1:, :] - keys[..., :-1, :]).square().sum(-1)
    return F.pad(-squared * torch.minimum(mass[..., 1:], mass[..., :-1]), (1, 0), value=-torch.inf)


def mass(tokens: Tokens) -> Tensor:
    """Minus the attention received (H2O, arXiv 2306.14048)."""
    return -relative(tokens.mass)


def value_attention(tokens: Tokens) -> Tensor:
    """Minus the mean attention received times the length of the value, what the token adds to outputs (arXiv 2406.12335)."""
    return -relative(mean_attention(tokens) * tokens.values.float().norm(dim=-1))


def idle(tokens: Tokens) -> Tensor:
    """Minus the mean attention received."""
    return -relative(mean_attention(tokens))


def window(tokens: Tokens) -> Tensor:
    """Minus the attention received from the newest 32 queries (SnapKV, arXiv 2404.14469)."""
    return -relative(tokens.windows.get(32))


def long_window(tokens: Tokens) -> Tensor:
    """Minus the attention received from the newest 128 queries."""
    return -relative(tokens.windows.get(128))


def age(tokens: Tokens) -> Tensor:
    """Older tokens first (StreamingLLM, arXiv 2309.17453): from 1 for the oldest down to 0."""
    count = tokens.keys.shape[2]
    ages = torch.linspace(1, 0, count, device=tokens.keys.device)
    return ages.expand(tokens.keys.shape[:3])


def random(tokens: Tokens) -> Tensor:
    """Drawn by the policy's seed, evenly between 0 and 1: the control that every ranking has to beat."""
    return uniform(tokens, salt=0).expand(tokens.keys.shape[:3])


# The names a policy and a profile can use.
AFFINITIES: dict[str, Affinity] = {
    "cosine": Affinity(cosine),
    "displacement": Affinity(displacement, mass=True),
    "mass": Affinity(mass, mass=True),
    "idle": Affinity(idle, mass=True),
    "value-attention": Affinity(value_attention, mass=True),
    "window": Affinity(window, window=32),
    "long-window": Affinity(long_window, window=128),
    "age": Affinity(age),
    "keydiff": Affinity(keydiff),
    "nested": Affinity(nested),
    "expected": Affinity(expected, mass=True, queries=FUTURE_QUERIES),
    "decayed": Affinity(decayed, mass=True, queries=DECAY_QUERIES),
    "again": Affinity(again, mass=True, again=True),
    "random": Affinity(random),
}
