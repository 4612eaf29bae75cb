"""What merging costs: the damage of every policy at every budget, for each layer and KV head.

A head's tokens are merged by a policy to a share of their number, and the probe's queries attend to what is left. The
change of the attention output is weighed by how much the model's answer depends on it: with g the gradient of the log
probability of a token drawn from the model's own prediction, E[(g . change)^2] / 2 is, to second order, the KL divergence
the change causes (the Fisher information as curvature; Martens, arXiv 1412.1193). So damage is in nats per token, adds up
over heads, and layers need no weights of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.measure.moments import Moments
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.tokens import Tokens
from kvprofile.probes import KINDS
from kvprofile.runtime.attention import AttentionCall

BUDGETS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Reading:
    """One layer's attention of the probe, and how the answer depends on it.

    context: the tokens to be merged, the recent ones included, with mass and windows. call: the probe's attention; its
    keys are those of context and probe. gradients `(draws, queries, heads, value_dim)` float32: of the log-probability of
    drawn answers at the attention's output. kind `(queries,)`: the kind of each probe token.
    """

    context: Tokens
    call: AttentionCall
    gradients: Tensor
    kind: Tensor


class DamageCurves:
    """Mean and spread over samples of the damage, `(layers, policies, kv_heads, budgets, kinds)`, in nats per token."""

    def __init__(
        self, layers: int, kv_heads: int, policies: Sequence[tuple[str, Policy]], kinds: Sequence[str]
    ) -> None:
        self.policies, self.kinds = tuple(policies), tuple(kinds)
        self.shape = (len(self.policies), kv_heads, len(BUDGETS), len(self.kinds))
        self.moments = Moments(layers, self.shape)

    def update(self, layer: int, reading: Reading) -> None:
        """Add one sample's layer."""
        self.moments.update(layer, damage(reading, [policy for _, policy in self.policies], self.kinds))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by name: what is kept on disk."""
        return self.moments.state()

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.moments.merge(other.moments)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """`damage_mean` and `damage_std`, `(layers, policies, kv_heads, budgets, kinds)`."""
        return {
            "damage_mean": self.moments.mean.astype(np.float32),
            "damage_std": self.moments.std().astype(np.float32),
        }


def damage(reading: Reading, policies: Sequence[Policy], kinds: Sequence[str]) -> NDArray[np.float64]:
    """Damage of one layer of one sample: `(policies, kv_heads, budgets, kinds)`."""
    probe = _Probed(reading, [KINDS.index(kind) for kind in kinds])
    return np.stack([_drop(probe, policy) if policy.only_drops else _merge(probe, policy) for policy in policies])


class _Probed:
    """The probe's attention over the context, split so that any part can be replaced.

    weights `(kv_heads, group * queries, tokens)`: exp of the context's logits less each query's maximum. above, below:
    numerator and denominator of the attention over the probe's own tokens. exact: the output with nothing merged, in the
    same arithmetic: a model's own output in half precision is off by more than the changes that are measured.
    """

    def __init__(self, reading: Reading, kinds: Sequence[int]) -> None:
        self.kinds = kinds
        call, self.context = reading.call, reading.context
        heads, queries, dim = call.query.shape[1:]
        self.kv_heads, tokens = call.key.shape[1], self.context.keys.shape[2]
        group = heads // self.kv_heads
        self.call, self.reading, self.group, self.queries = call, reading, group, queries
        self.query = call.query[0].reshape(self.kv_heads, group * queries, dim).float()
        logits = self.logits(call.key[0].float())
        own = torch.arange(queries, device=logits.device)
        hidden = (own[None, :] > own[:, None]).repeat(group, 1)
        logits[:, :, tokens:].masked_fill_(hidden, -torch.inf)
        self.top = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - self.top)
        self.weights = weights[:, :, :tokens]
        self.above = weights[:, :, tokens:] @ call.value[0, :, tokens:].float()
        self.below = weights[:, :, tokens:].sum(-1, keepdim=True)
        if call.sinks is not None:
            sinks = call.sinks.float().view(self.kv_heads, group, 1).repeat_interleave(queries, dim=1)
            self.below = self.below + torch.exp(sinks - self.top)
        above, below = self.recent(0)
        self.exact = (self.above + above) / (self.below + below)

    def logits(self, keys: Tensor) -> Tensor:
        """Logits of the probe's queries over `keys` `(kv_heads, slots, head_dim)`."""
        logits = (self.query @ keys.transpose(-1, -2)) * self.call.scaling
        return logits if self.call.softcap is None else self.call.softcap * torch.tanh(logits / self.call.softcap)

    def error(self, above: Tensor, below: Tensor) -> NDArray[np.float64]:
        """Damage `(kv_heads, kinds)` of attending to slots with this numerator and denominator, and the probe's own."""
        change = (self.above + above) / (self.below + below) - self.exact
        change = change.unflatten(1, (self.group, self.queries))
        gradients = self.reading.gradients.unflatten(2, (self.kv_heads, self.group))
        slope = torch.einsum("rqhgd,hgqd->rhq", gradients, change)
        cost = slope.square().mean(0) / 2
        return np.stack(
            [cost[:, self.reading.kind == kind].mean(-1).double().cpu().numpy() for kind in self.kinds], axis=-1
        )

    def split(self, policy: Policy) -> tuple[Tokens, int, int]:
        """The tokens the policy may merge, how many recent ones it keeps apart, how many heavy ones it protects."""
        tokens = self.context.keys.shape[2]
        recent = policy.protection.recent_tokens(tokens)
        return self.context.oldest(tokens - recent), recent, policy.protection.heavy_tokens(tokens)

    def recent(self, aged: int) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the context's tokens from `aged` on."""
        weights = self.weights[:, :, aged:]
        return weights @ self.context.values[0, :, aged:].float(), weights.sum(-1, keepdim=True)


def _drop(probe: _Probed, policy: Policy) -> NDArray[np.float64]:
    """Damage `(kv_heads, budgets, kinds)` of evicting: tokens are added back in order of rank, each counted once."""
    part, recent, heavy = probe.split(policy)
    aged = part.keys.shape[2]
    affinity = policy.rank(part)[0]
    protected = protected_tokens(policy.protection, part, heavy)[0]
    affinity = affinity.masked_fill(protected, -torch.inf)
    least = int(protected.sum(-1).max())
    order = affinity.argsort(dim=-1, stable=True, descending=True).flip(-1)
    values = part.values[0].float().gather(1, order[..., None].expand(-1, -1, part.values.shape[-1]))
    weights = probe.weights[:, :, :aged].gather(2, order[:, None, :].expand(-1, probe.weights.shape[1], -1))
    above, below = probe.recent(aged)
    errors, low = [], 0
    for budget in BUDGETS:
        high = min(aged, max(low, least, round(budget * (aged + recent)) - recent))
        above = above + weights[:, :, low:high] @ values[:, low:high]
        below = below + weights[:, :, low:high].sum(-1, keepdim=True)
        errors.append(probe.error(above, below))
        low = high
    return np.stack(errors, axis=1)


def _merge(probe: _Probed, policy: Policy) -> NDArray[np.float64]:
    """Damage `(kv_heads, budgets, kinds)` of merging, with the very function the runtime uses."""
    part, recent, heavy = probe.split(policy)
    aged = part.keys.shape[2]
    above, below = probe.recent(aged)
    errors = []
    for budget in BUDGETS:
        count = torch.full((1, probe.kv_heads), max(1, round(budget * (aged + recent)) - recent))
        slots = merge_tokens(part, policy, epsilon=None, count=count, heavy=heavy)
        longest = max(slots.lengths)
        keys = _padded(slots.keys, slots.lengths, longest)
        values = _padded(slots.values, slots.lengths, longest)
        bias = _padded(slots.bias, slots.lengths, longest, fill=-torch.inf)
        weights = torch.exp(probe.logits(keys) + bias[:, None, :] - probe.top)
        errors.append(probe.error(above + weights @ values, below + weights.sum(-1, keepdim=True)))
    return np.stack(errors, axis=1)


def _padded(flat: Tensor, lengths: list[int], longest: int, fill: float = 0.0) -> Tensor:
    """Slots of equal length are only viewed; heads whose protected tokens exceed the count make others be padded."""
    if min(lengths) == longest:
        return flat.float().view(len(lengths), longest, *flat.shape[1:])
    pieces = flat.float().split(lengths)
    pad = (0, 0) * (flat.dim() - 1)
    return torch.stack([F.pad(piece, (*pad, 0, longest - len(piece)), value=fill) for piece in pieces])
