"""Affinity: how readily a token gives up its slot. The larger, the sooner it is merged or dropped.

Every policy ranks tokens by one of these. An affinity is `(batch, kv_heads, tokens)`; where tokens are merged, entry t is
about joining the set of token t - 1. Affinities made from attention are relative to the mean over the tokens at hand, so
that a threshold means the same at every length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.sets import adjacent_cosine


@dataclass(frozen=True)
class Tokens:
    """What a policy sees of the tokens it may merge or drop; the protected recent tokens are not among them.

    keys `(batch, kv_heads, tokens, head_dim)`, values `(batch, kv_heads, tokens, value_dim)`. mass
    `(batch, kv_heads, tokens)`: attention received from all queries; windows: attention received from the newest queries,
    by their number, pooled over neighbours; both only where a policy at hand asks for them. position: true position of
    the first token. seen: tokens of the text so far, these and newer ones.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor | None
    windows: dict[int, Tensor]
    position: int
    seen: int

    def of_heads(self, heads: list[int]) -> "Tokens":
        """The same tokens, of some KV heads only."""
        return Tokens(
            self.keys[:, heads],
            self.values[:, heads],
            None if self.mass is None else self.mass[:, heads],
            {size: received[:, heads] for size, received in self.windows.items()},
            self.position,
            self.seen,
        )

    def oldest(self, count: int) -> "Tokens":
        """The oldest `count` of the tokens."""
        return Tokens(
            self.keys[:, :, :count],
            self.values[:, :, :count],
            None if self.mass is None else self.mass[..., :count],
            {size: received[..., :count] for size, received in self.windows.items()},
            self.position,
            self.seen,
        )


def cosine(tokens: Tokens) -> Tensor:
    """Cosine with the older neighbour's key (KVMerger, arXiv 2407.08454)."""
    return F.pad(adjacent_cosine(tokens.keys), (1, 0), value=-torch.inf)


def displacement(tokens: Tokens) -> Tensor:
    """Minus the squared distance to the older neighbour's key, weighted by the lighter one's attention mass.

    What merging two neighbours into the heavier one's key moves, times how much it is looked at.
    """
    keys, mass = tokens.keys.float(), _relative(tokens.mass)
    squared = (keys[..., 1:, :] - keys[..., :-1, :]).square().sum(-1)
    return F.pad(-squared * torch.minimum(mass[..., 1:], mass[..., :-1]), (1, 0), value=-torch.inf)


def mass(tokens: Tokens) -> Tensor:
    """Minus the attention received (H2O, arXiv 2306.14048)."""
    return -_relative(tokens.mass)


def value_attention(tokens: Tokens) -> Tensor:
    """Minus the mean attention received times the length of the value, what the token adds to outputs (arXiv 2406.12335)."""
    return -_relative(mean_attention(tokens) * tokens.values.float().norm(dim=-1))


def idle(tokens: Tokens) -> Tensor:
    """Minus the mean attention received."""
    return -_relative(mean_attention(tokens))


def window(tokens: Tokens) -> Tensor:
    """Minus the attention received from the newest 32 queries (SnapKV, arXiv 2404.14469)."""
    return -_relative(tokens.windows.get(WINDOWS["window"]))


def long_window(tokens: Tokens) -> Tensor:
    """Minus the attention received from the newest 128 queries."""
    return -_relative(tokens.windows.get(WINDOWS["long-window"]))


def age(tokens: Tokens) -> Tensor:
    """Older tokens first (StreamingLLM, arXiv 2309.17453): from 1 for the oldest down to 0."""
    count = tokens.keys.shape[2]
    ages = torch.linspace(1, 0, count, device=tokens.keys.device)
    return ages.expand(tokens.keys.shape[:3])


AFFINITIES: dict[str, Callable[[Tokens], Tensor]] = {
    "cosine": cosine,
    "displacement": displacement,
    "mass": mass,
    "idle": idle,
    "value-attention": value_attention,
    "window": window,
    "long-window": long_window,
    "age": age,
}
NEEDS_MASS = ("displacement", "mass", "idle", "value-attention")
WINDOWS = {"window": 32, "long-window": 128}  # newest queries an affinity looks at
_UNMEASURED = "this affinity needs attention received, and none was measured"


def mean_attention(tokens: Tokens) -> Tensor:
    """Attention received per query that could give it: `(batch, kv_heads, tokens)`.

    The plain sum favours old tokens, which more queries have seen.
    """
    if tokens.mass is None:
        raise ValueError(_UNMEASURED)
    queries = tokens.seen - tokens.position - torch.arange(tokens.keys.shape[2], device=tokens.keys.device)
    return tokens.mass / queries


def _relative(received: Tensor | None) -> Tensor:
    if received is None:
        raise ValueError(_UNMEASURED)
    return received / received.mean(-1, keepdim=True).clamp_min(1e-30)
