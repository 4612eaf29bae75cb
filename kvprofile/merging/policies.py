"""A policy is a value: which tokens are protected, which give up their slots first, and what becomes of them."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.affinity import AFFINITIES, NEEDS_MASS, WINDOWS, Tokens, mean_attention
from kvprofile.merging.combine import Combination, Slots, combine
from kvprofile.merging.protect import Protection, protected_tokens
from kvprofile.merging.sets import RULES, find_sets, mergeable_links


@dataclass(frozen=True)
class Policy:
    """Everything that decides what a merged cache looks like, except the thresholds and the slot counts.

    affinity: which tokens give up their slots first (`affinity.AFFINITIES`).
    rule: how merged tokens form sets: `chain`, `anchor` or `complete` (the latter two by cosine), or `drop`: tokens
        that give up their slots are evicted.
    protection, combination: see there; the combination is not used by `drop`.
    """

    affinity: str = "cosine"
    rule: str = "chain"
    protection: Protection = field(default_factory=Protection)
    combination: Combination = field(default_factory=Combination)

    def __post_init__(self) -> None:
        if self.rule not in (*RULES, "drop"):
            raise ValueError(f"unknown rule {self.rule!r}; expected one of {', '.join(RULES)}, drop")
        if self.affinity not in AFFINITIES:
            raise ValueError(f"unknown affinity {self.affinity!r}; expected one of {', '.join(AFFINITIES)}")
        if self.rule in ("anchor", "complete") and self.affinity != "cosine":
            raise ValueError(f"the rule {self.rule} goes by cosine, not by {self.affinity}")

    @property
    def has_pivots(self) -> bool:
        """True if sets have a pivot, the member with the largest attention mass."""
        combination = self.combination
        plain = combination.weights == "average" and combination.bias != "attention" and not combination.keep_pivot_key
        return self.rule != "drop" and not plain

    @property
    def needs_mass(self) -> bool:
        """True if the attention mass has to be measured."""
        return self.affinity in NEEDS_MASS or self.has_pivots or self.protection.heavy_share > 0

    @property
    def window(self) -> int | None:
        """How many of the newest queries' attention has to be measured, if any."""
        return WINDOWS.get(self.affinity)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Policy":
        """Build a policy from `to_dict`'s output. Raises TypeError or ValueError on unknown fields or values."""
        values = dict(values)
        return cls(
            protection=Protection(**values.pop("protection")),
            combination=Combination(**values.pop("combination")),
            **values,
        )


_PAPER = Protection(first=0, recent=0, recent_share=0.17, heavy_share=0.12)

# The policies the command line offers by name.
POLICIES: dict[str, Policy] = {
    # Chains of similar keys, Gaussian weights, every slot counted for the tokens it holds.
    "gauss": Policy(),
    # The same with every token weighed by the attention it received.
    "attention": Policy(combination=Combination(weights="attention")),
    # Tokens little looked at join the set before them; the slot has its pivot's key and the whole set's attention.
    "absorb": Policy("idle", combination=Combination("attention", keep_pivot_key=True, bias="attention")),
    "average": Policy(combination=Combination(weights="average")),
    # Sets keep their pivot's key and value, and count for all.
    "pivot": Policy("displacement", combination=Combination(weights="pivot")),
    # The pivot's key is kept, the values are averaged with Gaussian weights.
    "pivot-key": Policy("displacement", combination=Combination(keep_pivot_key=True)),
    # KVMerger (arXiv 2407.08454): anchor sets, sigma 5, 17% recent and 12% heavy tokens protected, no count bias.
    "kvmerger": Policy("cosine", "anchor", _PAPER, Combination(sigma=5.0, bias="none")),
    # The same with values scaled by the size of the set, exactly as printed.
    "kvmerger-printed": Policy("cosine", "anchor", _PAPER, Combination(sigma=5.0, bias="none", scale_values=True)),
    # Eviction: what is not kept is dropped.
    "h2o": Policy("mass", "drop"),
    "value-attention": Policy("value-attention", "drop"),
    "snapkv": Policy("window", "drop"),
    "snapkv-128": Policy("long-window", "drop"),
    "streaming": Policy("age", "drop"),
}


def merge_tokens(
    tokens: Tokens, policy: Policy, *, epsilon: Tensor | None = None, count: Tensor | None = None, heavy: int = 0
) -> Slots:
    """Turn the tokens of one layer into slots under a policy.

    `epsilon` `(kv_heads,)`: tokens at least this affine give up their slots, and slots emerge. `count`
    `(batch, kv_heads)`: every head ends with exactly that many slots, as far as protected tokens allow. Anchor and
    complete sets are found at `epsilon` first and then, with `count`, joined or split at their most and least similar
    neighbours; all other policies take one of the two. `heavy` tokens are protected for their mass.
    """
    protected = protected_tokens(policy.protection, tokens, heavy)
    affinity = AFFINITIES[policy.affinity](tokens)
    drops = policy.rule == "drop"
    allowed = ~protected if drops else F.pad(mergeable_links(protected), (1, 0), value=False)
    if policy.rule in ("anchor", "complete"):
        if epsilon is None:
            raise ValueError(f"the rule {policy.rule} needs thresholds")
        lost = ~find_sets(tokens.keys, epsilon, policy.rule, protected)
        # Cosines lie within [-1, 1]: adding 4 puts every link of a set before every link between two sets.
        affinity = affinity + 4.0 * lost
    elif count is None:
        if epsilon is None:
            raise ValueError("either thresholds or slot counts are needed")
        lost = (affinity >= epsilon.to(affinity.device, affinity.dtype)[None, :, None]) & allowed
    if count is not None:
        lost = most_affine(affinity, allowed, affinity.shape[-1] - count.to(affinity.device))
    if drops:
        return _drop(tokens, lost)
    received = None
    if policy.has_pivots:
        by_attention = "attention" in (policy.combination.weights, policy.combination.bias)
        received = mean_attention(tokens) if by_attention else tokens.mass
    return combine(tokens.keys, tokens.values, ~lost, received, policy.combination)


def merge_layer(
    tokens: Tokens,
    policies: tuple[tuple[Policy, tuple[int, ...]], ...],
    *,
    epsilon: Tensor,
    count: Tensor | None,
    heavy: tuple[int, ...],
) -> Slots:
    """Turn the tokens of one layer into slots, every KV head under its own policy.

    `policies` pairs a policy with the KV heads that follow it; `heavy` has one entry per pair; the rest is as in
    `merge_tokens`.
    """
    if len(policies) == 1:
        return merge_tokens(tokens, policies[0][0], epsilon=epsilon, count=count, heavy=heavy[0])
    batch, kv_heads = tokens.keys.shape[:2]
    pieces: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    for (policy, heads), protected in zip(policies, heavy, strict=True):
        index = list(heads)
        slots = merge_tokens(
            tokens.of_heads(index),
            policy,
            epsilon=epsilon[index],
            count=None if count is None else count[:, index],
            heavy=protected,
        )
        split = zip(*(part.split(slots.lengths) for part in (slots.keys, slots.values, slots.bias)), strict=True)
        for place, piece in enumerate(split):
            pieces[place // len(heads), heads[place % len(heads)]] = piece
    ordered = [pieces[row, head] for row in range(batch) for head in range(kv_heads)]
    keys, values, bias = (torch.cat(parts) for parts in zip(*ordered, strict=True))
    return Slots(keys, values, bias, [len(piece[0]) for piece in ordered])


def most_affine(affinity: Tensor, allowed: Tensor, losses: Tensor) -> Tensor:
    """Mark the `losses` most affine of the allowed tokens of every head, or all allowed ones if they are fewer.

    `affinity` and `allowed` are `(batch, kv_heads, tokens)`, `losses` `(batch, kv_heads)`. Ties go to the older token.
    """
    order = affinity.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < losses[..., None]) & allowed


def _drop(tokens: Tokens, lost: Tensor) -> Slots:
    kept = ~lost
    keys, values = tokens.keys[kept], tokens.values[kept]
    return Slots(keys, values, torch.zeros(len(keys), device=keys.device), kept.sum(-1).reshape(-1).tolist())
