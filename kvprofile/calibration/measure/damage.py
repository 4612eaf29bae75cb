"""What merging costs: the damage of every policy at every budget, for each layer and KV head.

A head's tokens are merged by a policy to a share of their number, and the probe's queries attend to what is left. The
change of the attention output is weighed by how much the model's answer depends on it: with g the gradient of the log
probability of a token drawn from the model's own prediction, E[(g . change)^2] / 2 is, to second order, the KL divergence
the change causes (the Fisher information as curvature; Martens, arXiv 1412.1193). So damage is in nats per token, adds up
over heads, and layers need no weights of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvprofile.calibration.measure.moments import Moments
from kvprofile.calibration.measure.probed import Probed, Reading
from kvprofile.calibration.probe_mix import KINDS
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Queries, Tokens

BUDGETS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
MANY = 0.9  # beyond this share a merged head's damage is asked of few queries: most slots, for the least harm
MERGED_BYTES = (
    256 * 2**20
)  # of the keys and values, in float32, that are merged at a time where there is a device to wait for


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
    """Damage of one layer of one sample: `(policies, kv_heads, budgets, kinds)`. Copied from the device once."""
    places = [KINDS.index(kind) for kind in kinds]
    parts = []
    for part in reading.parts():
        probe, few = Probed(part, places), Probed(part.thinned(), places)
        parts.append(
            torch.stack(
                [_drop(probe, policy) if policy.only_drops else _merge(probe, few, policy) for policy in policies]
            )
        )
    return torch.cat(parts, dim=1).cpu().numpy().astype(np.float64)


def _drop(probe: Probed, policy: Policy) -> Tensor:
    """Damage `(kv_heads, budgets, kinds)` of evicting: tokens are added back in order of rank, each counted once."""
    part, recent, heavy = probe.split(policy)
    aged = part.keys.shape[2]
    affinity = policy.rank(part)[0]
    protected = protected_tokens(policy.protection, part, heavy)[0]
    affinity = affinity.masked_fill(protected, -torch.inf)
    # The first tokens of a text, and the heavy ones, of which some may be among the first: as many in one head as in all
    # where none are heavy.
    least = int(protected.sum(-1).max()) if heavy else min(policy.protection.first, aged)
    order = affinity.argsort(dim=-1, stable=True, descending=True).flip(-1)
    above, below = probe.recent(aged)
    errors, low = [], 0
    for budget in BUDGETS:
        high = min(aged, max(low, least, round(budget * (aged + recent)) - recent))
        added = order[:, low:high]
        weights = probe.weights[:, :, :aged].gather(2, added[:, None].expand(-1, probe.weights.shape[1], -1))
        values = part.values[0].gather(1, added[..., None].expand(-1, -1, part.values.shape[-1])).float()
        above = above + weights @ values
        below = below + weights.sum(-1, keepdim=True)
        errors.append(probe.damage(above, below))
        low = high
    return torch.stack(errors, dim=1)


def _merge(probe: Probed, few: Probed, policy: Policy) -> Tensor:
    """Damage `(kv_heads, budgets, kinds)` of merging."""
    usual, nearly_all = ([budget for budget in BUDGETS if (budget > MANY) == high] for high in (False, True))
    parts = [(probe, usual), (few, nearly_all)]
    return torch.cat([_merged(asked, policy, budgets) for asked, budgets in parts if budgets], dim=1)


def _merged(probe: Probed, policy: Policy, budgets: Sequence[float]) -> Tensor:
    """Damage `(kv_heads, budgets, kinds)` of merging, with the very function the runtime uses."""
    part, recent, heavy = probe.split(policy)
    tokens = part.keys.shape[2] + recent
    above, below = probe.recent(part.keys.shape[2])
    errors = []
    least = policy.least(policy.protection.first + heavy)
    for counts in together([max(least, round(budget * tokens) - recent) for budget in budgets], part):
        count = torch.tensor(counts)[:, None].expand(-1, probe.kv_heads)
        slots = merge_tokens(copies(part, len(counts)), policy, epsilon=None, count=count, heavy=heavy)
        for row in rows(slots, probe.kv_heads):
            numerator, denominator = probe.over(*padded(row))
            errors.append(probe.damage(above + numerator, below + denominator))
    return torch.stack(errors, dim=1)


def together(counts: list[int], part: Tokens) -> Iterator[list[int]]:
    """The slot counts that are merged at a time, each as a batch row: every merge waits for the device a few times.

    On a CPU one by one: nothing waits there, and what is small stays in its caches.
    """
    size = 1
    if part.keys.device.type != "cpu":
        size = max(1, MERGED_BYTES // (4 * (part.keys[0].numel() + part.values[0].numel())))
    for low in range(0, len(counts), size):
        yield counts[low : low + size]


def copies(part: Tokens, count: int) -> Tokens:
    """The same tokens as `count` batch rows; nothing is copied yet."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    def asked(queries: Queries | None) -> Queries | None:
        if queries is None:
            return None
        states, keys, values = (repeated(each) for each in (queries.states, queries.keys, queries.values))
        return replace(queries, states=states, keys=keys, values=values)

    return replace(
        part,
        keys=repeated(part.keys),
        values=repeated(part.values),
        mass=None if part.mass is None else repeated(part.mass),
        windows={size: repeated(received) for size, received in part.windows.items()},
        queries=asked(part.queries),
        again=asked(part.again),
    )


def rows(slots: Slots, kv_heads: int) -> Iterator[Slots]:
    """The slots of every batch row."""
    low = 0
    for first in range(0, len(slots.lengths), kv_heads):
        lengths = slots.lengths[first : first + kv_heads]
        high = low + sum(lengths)
        yield Slots(slots.keys[low:high], slots.values[low:high], slots.bias[low:high], lengths)
        low = high


def padded(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias of one row in float32, the heads of equal length.

    They are only viewed where they are equal: heads whose protected tokens exceed the count make others be padded.
    """
    longest = max(slots.lengths)

    def pad(flat: Tensor, fill: float) -> Tensor:
        if min(slots.lengths) == longest:
            return flat.float().view(len(slots.lengths), longest, *flat.shape[1:])
        room = (0, 0) * (flat.dim() - 1)
        pieces = flat.float().split(slots.lengths)
        return torch.stack([F.pad(piece, (*room, 0, longest - len(piece)), value=fill) for piece in pieces])

    return pad(slots.keys, 0.0), pad(slots.values, 0.0), pad(slots.bias, -torch.inf)
