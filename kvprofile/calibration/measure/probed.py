"""The probe's attention over the context, split so that any part of the context can be replaced by slots."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprofile.calibration.measure.weighing import Weighing
from kvprofile.merging.policies import Policy
from kvprofile.merging.tokens import Tokens
from kvprofile.runtime.attention import AttentionCall

EVERY = 3  # one of so many queries is asked where some are enough
PART_BYTES = 256 * 2**20  # of the attention weights that are at hand at a time


def some_of(kind: Tensor) -> Tensor:
    """Indices, rising, of one of `EVERY` tokens of each kind, and of at least one; tokens that do not count are left out."""
    return torch.cat([(kind == one).nonzero()[::EVERY, 0] for one in range(int(kind.max()) + 1)]).sort().values


@dataclass(frozen=True)
class Reading:
    """One layer's attention of the probe, and how the answer depends on it.

    context: the tokens to be merged, the recent ones included, with mass and windows. call: the probe's attention; its
    keys and values are those of the probe alone. gradients `(draws, queries, heads, value_dim)` float32: of the
    log-probability of drawn answers at the attention's output. kind `(queries,)`: the kind of each query's token. few: indices
    of the queries that are asked where some are enough (`some_of`). places `(queries,)`: which of the probe's tokens the
    queries are; None: all, in order.
    """

    context: Tokens
    call: AttentionCall
    gradients: Tensor
    kind: Tensor
    few: Tensor
    places: Tensor | None = None

    def thinned(self) -> "Reading":
        """The few queries alone; they look at all keys still."""
        call = replace(self.call, query=self.call.query[:, :, self.few])
        return Reading(self.context, call, self.gradients[:, self.few], self.kind[self.few], self.few, self.few)

    def parts(self) -> Iterator["Reading"]:
        """The KV heads in parts whose attention weights fit into `PART_BYTES`, of one head at least."""
        heads, queries = self.call.query.shape[1:3]
        kv_heads, tokens = self.context.keys.shape[1:3]
        group = heads // kv_heads
        size = max(1, PART_BYTES // (4 * group * queries * (tokens + queries)))
        if size >= kv_heads:
            yield self
            return
        for low in range(0, kv_heads, size):
            high = min(kv_heads, low + size)
            of_query = slice(low * group, high * group)
            options, sinks = self.call.options, self.call.softmax.sinks
            if sinks is not None:
                options = {**options, "s_aux": sinks[of_query]}
            call = replace(
                self.call,
                query=self.call.query[:, of_query],
                key=self.call.key[:, low:high],
                value=self.call.value[:, low:high],
                options=options,
            )
            context = self.context.of_heads(list(range(low, high)))
            yield Reading(context, call, self.gradients[:, :, of_query], self.kind, self.few, self.places)


class Probed:
    """A reading's attention, computed in float32.

    weights `(kv_heads, group * queries, tokens)`: exp of the context's logits less each query's maximum. above, below:
    numerator and denominator of the attention over the probe's own tokens. exact: the output with nothing merged, in the
    same arithmetic: a model's own output in half precision is off by more than the changes that are measured.
    """

    def __init__(self, reading: Reading, kinds: list[int]) -> None:
        call, self.context = reading.call, reading.context
        heads, queries, dim = call.query.shape[1:]
        self.kv_heads = call.key.shape[1]
        group = heads // self.kv_heads
        self.call = call
        self.weighing = Weighing(reading.gradients, reading.kind, kinds, self.kv_heads)
        self.query = call.query[0].reshape(self.kv_heads, group * queries, dim).float()
        own, logits = self.logits(call.key[0].float()), self.logits(self.context.keys[0].float())
        order = torch.arange(call.key.shape[2], device=own.device)
        places = order if reading.places is None else reading.places
        future = order > places[:, None]
        own.unflatten(1, (group, queries)).masked_fill_(future, -torch.inf)
        self.top = torch.maximum(own.amax(-1, keepdim=True), logits.amax(-1, keepdim=True))
        self.weights = logits.sub_(self.top).exp_()
        own = own.sub_(self.top).exp_()
        self.above = own @ call.value[0].float()
        self.below = own.sum(-1, keepdim=True)
        if call.softmax.sinks is not None:
            sinks = (
                call.softmax.sinks.float().view(self.kv_heads, group, 1, 1).expand(-1, -1, queries, -1).flatten(1, 2)
            )
            self.below = self.below + torch.exp(sinks - self.top)
        above, below = self.recent(0)
        self.exact = (self.above + above) / (self.below + below)

    def logits(self, keys: Tensor) -> Tensor:
        """Logits of the probe's queries over `keys` `(kv_heads, slots, head_dim)`."""
        softmax = self.call.softmax
        return softmax.cap_((self.query @ keys.transpose(-1, -2)).mul_(softmax.scaling))

    def over(self, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of slots: `(kv_heads, slots, dim)`, `(kv_heads, slots, value_dim)`, `(kv_heads, slots)`."""
        weights = self.weigh(keys, bias)
        return weights @ values, weights.sum(-1, keepdim=True)

    def weigh(self, keys: Tensor, bias: Tensor) -> Tensor:
        """Weights `(kv_heads, group * queries, slots)` of slots, in the unit of `weights`."""
        return self.logits(keys).add_(bias[:, None, :]).sub_(self.top).exp_()

    def damage(self, above: Tensor, below: Tensor) -> Tensor:
        """Damage `(kv_heads, kinds)` of attending to slots with this numerator and denominator, and the probe's own.

        NaN for a kind the probe has none of.
        """
        return self.change((self.above + above) / (self.below + below) - self.exact)

    def change(self, change: Tensor) -> Tensor:
        """Damage `(kv_heads, kinds)` of a change of the output, `(kv_heads, group * queries, value_dim)`."""
        return self.weighing.damage(change)

    def split(self, policy: Policy) -> tuple[Tokens, int, int]:
        """The tokens the policy may merge, how many recent ones it keeps apart, how many heavy ones it protects."""
        tokens = self.context.keys.shape[2]
        recent = policy.protection.recent_tokens(tokens)
        return self.context.oldest(tokens - recent), recent, policy.protection.heavy_tokens(tokens)

    def recent(self, aged: int) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the context's tokens from `aged` on."""
        weights = self.weights[:, :, aged:]
        return weights @ self.context.values[0, :, aged:].float(), weights.sum(-1, keepdim=True)
