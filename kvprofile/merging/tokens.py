"""What a policy sees: the tokens of one layer, and queries that look at them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprofile.merging.host import select, selector, sent
from kvprofile.merging.softmax import Softmax

ROWS_AGAIN = 288  # queries asked again of every KV head, its group's together: a third the newest, the others spread
LATER = 64  # how many tokens after the text they are asked

# States `(batch, heads, queries, head_dim)` float32, every query turned so many positions on, `(queries,)`.
Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Queries:
    """Queries of the text, and what they look at beside the tokens at hand.

    states `(batch, kv_heads, group, queries, head_dim)`, already multiplied by the scaling: a query's product with a key is
    the logit, up to the soft cap. keys, values `(batch, kv_heads, newer, dim)`: of the tokens newer than those at hand. sinks
    `(kv_heads, group)`: logits of attention sinks the model adds to every softmax, if any.
    """

    states: Tensor
    keys: Tensor
    values: Tensor
    softcap: float | None = None
    sinks: Tensor | None = None

    def logits(self, keys: Tensor) -> Tensor:
        """Logits `(batch, kv_heads, group, queries, keys)` over keys `(batch, kv_heads, keys, head_dim)`."""
        # One product a KV head: broadcast over the group, its keys would be copied for every query head.
        logits = self.states.flatten(2, 3) @ keys.float().transpose(-1, -2)
        logits = logits.unflatten(2, self.states.shape[2:4])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def newest(self, count: int) -> "Queries":
        """The newest `count` of them."""
        return replace(self, states=self.states[..., max(0, self.states.shape[3] - count) :, :])

    def of_heads(self, chosen: slice | list[int]) -> "Queries":
        """Those of some KV heads only."""
        return Queries(
            select(self.states, chosen, 1),
            select(self.keys, chosen, 1),
            select(self.values, chosen, 1),
            self.softcap,
            None if self.sinks is None else select(self.sinks, chosen, 0),
        )

    def beside(self, keys: Tensor, values: Tensor) -> "Queries":
        """The same, where these tokens `(batch, kv_heads, tokens, dim)`, older than the newer ones, have joined them."""
        return replace(self, keys=torch.cat([keys, self.keys], dim=2), values=torch.cat([values, self.values], dim=2))


def newest_queries(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    *,
    count: int,
) -> Queries:
    """The newest `count` of the queries `(batch, heads, queries, head_dim)` of an attention over all of `keys`."""
    return _grouped(query[:, :, max(0, query.shape[2] - count) :].float(), keys, values, softmax)


def asked_again(query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, turn: Turn) -> Queries:
    """Some of the queries `(batch, heads, queries, head_dim)`, from all of the text, as if they were asked after it.

    A model that reads something again asks much what it asked the first time, from a later position: so queries evenly spaced
    over the text, and the newest, are turned on to one place a little after its end. They see all tokens.
    """
    count, asked = query.shape[2], max(3, ROWS_AGAIN * keys.shape[1] // query.shape[1])
    stride, newest = max(1, -(-count // (asked - asked // 3))), max(0, count - asked // 3)
    places = sent([*range((count - 1) % stride, newest, stride), *range(newest, count)], query.device)
    return _grouped(turn(query.index_select(2, places).float(), count - 1 + LATER - places), keys, values, softmax)


def _grouped(states: Tensor, keys: Tensor, values: Tensor, softmax: Softmax) -> Queries:
    kv_heads = keys.shape[1]
    grouped = (states * softmax.scaling).unflatten(1, (kv_heads, -1))
    own = None if softmax.sinks is None else softmax.sinks.float().view(kv_heads, -1)
    return Queries(grouped, keys[:, :, :0], values[:, :, :0], softmax.softcap, own)


@dataclass(frozen=True)
class Tokens:
    """What a policy sees of the tokens it may merge or drop; the protected recent tokens are not among them.

    keys `(batch, kv_heads, tokens, head_dim)`, values `(batch, kv_heads, tokens, value_dim)`. mass
    `(batch, kv_heads, tokens)`: attention received from all queries; windows: attention received from the newest queries,
    by their number, pooled over neighbours; queries: the newest queries themselves; each only where a policy at hand asks
    for it, and queries only until the first slots exist. again: queries from all of the text as if asked after it; None too
    where it is not known how to turn them. position: true position of the first token. seen: tokens of the
    text so far, these and newer ones. heads: which KV heads of the layer these are (None: all, in order). seed: of what
    a policy draws.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor | None
    windows: dict[int, Tensor]
    position: int
    seen: int
    queries: Queries | None = None
    heads: tuple[int, ...] | None = None
    seed: int = 0
    again: Queries | None = None

    def of_heads(self, heads: list[int]) -> "Tokens":
        """The same tokens, of some KV heads only."""
        known = range(self.keys.shape[1]) if self.heads is None else self.heads
        chosen = selector(heads)
        return replace(
            self,
            keys=select(self.keys, chosen, 1),
            values=select(self.values, chosen, 1),
            mass=None if self.mass is None else select(self.mass, chosen, 1),
            windows={size: select(received, chosen, 1) for size, received in self.windows.items()},
            queries=None if self.queries is None else self.queries.of_heads(chosen),
            again=None if self.again is None else self.again.of_heads(chosen),
            heads=tuple(known[head] for head in heads),
        )

    def oldest(self, count: int) -> "Tokens":
        """The oldest `count` of the tokens; the queries still see the others."""
        newer = self.keys[:, :, count:], self.values[:, :, count:]
        return replace(
            self,
            keys=self.keys[:, :, :count],
            values=self.values[:, :, :count],
            mass=None if self.mass is None else self.mass[..., :count],
            windows={size: received[..., :count] for size, received in self.windows.items()},
            queries=None if self.queries is None else self.queries.beside(*newer),
            again=None if self.again is None else self.again.beside(*newer),
        )


def mean_attention(tokens: Tokens) -> Tensor:
    """Attention received per query that could give it: `(batch, kv_heads, tokens)`.

    The plain sum favours old tokens, which more queries have seen.
    """
    queries = tokens.seen - tokens.position - torch.arange(tokens.keys.shape[2], device=tokens.keys.device)
    return measured(tokens.mass) / queries


def measured(received: Tensor | None) -> Tensor:
    """Attention received. Raises ValueError where none was measured."""
    if received is None:
        raise ValueError("this affinity needs attention received, and none was measured")
    return received


def relative(received: Tensor | None) -> Tensor:
    """Attention received, in units of its mean over the tokens at hand: a threshold means the same at every length."""
    received = measured(received)
    return received / received.mean(-1, keepdim=True).clamp_min(1e-30)
