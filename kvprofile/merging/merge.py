"""Merging a layer: its tokens become slots, every KV head under its policy."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprofile.merging.joining import JOINS
from kvprofile.merging.losses import Losses, most_affine
from kvprofile.merging.matching import match
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.regression import regress
from kvprofile.merging.sets import SET_RULES, find_sets, mergeable_links
from kvprofile.merging.slots import Slots
from kvprofile.merging.strain import give_up_more, may_strain
from kvprofile.merging.tokens import Tokens


def merge_tokens(
    tokens: Tokens, policy: Policy, *, epsilon: Tensor | None = None, count: Tensor | None = None, heavy: int = 0
) -> Slots:
    """Turn the tokens of one layer into slots under a policy.

    `epsilon` `(kv_heads,)`: tokens at least this affine give up their slots, and slots emerge. `count`
    `(batch, kv_heads)`: every head ends with exactly that many slots, as far as protected tokens allow; where those leave
    fewer slots than there are pieces between them, see `strain`. Anchor and complete sets are found at `epsilon` first and
    then, with `count`, joined or split at their most and least similar neighbours; all other policies take one of the two.
    `heavy` tokens are protected for their mass.
    """
    protected = protected_tokens(policy.protection, tokens, heavy)
    affinity = policy.rank(tokens)
    allowed = F.pad(mergeable_links(protected), (1, 0), value=False) if policy.rule in SET_RULES else ~protected
    if policy.rule in ("anchor", "complete"):
        if epsilon is None:
            raise ValueError(f"the rule {policy.rule} needs thresholds")
        lost = ~find_sets(tokens.keys, epsilon, policy.rule, protected)
        # Cosines lie within [-1, 1]: adding 4 puts every link of a set before every link between two sets.
        affinity = affinity + 4.0 * lost
    elif count is None:
        if epsilon is None:
            raise ValueError("either thresholds or slot counts are needed")
        lost = (affinity >= epsilon.to(affinity.device, affinity.dtype, non_blocking=True)[None, :, None]) & allowed
    first = min(affinity.shape[-1], max(0, policy.protection.first - tokens.position))
    losses = None if count is None else affinity.shape[-1] - count
    strained = count is not None and policy.rule in SET_RULES and may_strain(count, heavy + 1, first + heavy)
    if losses is not None:
        asked = losses.to(affinity.device, non_blocking=True)
        lost = most_affine(affinity, allowed, asked)
        if strained:
            lost = give_up_more(tokens, lost, protected, asked)
    if losses is None or heavy:
        lengths = (~lost).sum(-1).reshape(-1).tolist()
    else:
        # Known without asking the device.
        lengths = (affinity.shape[-1] - losses.clamp(0, affinity.shape[-1] - first)).reshape(-1).tolist()
    given = Losses(replace(tokens, seed=policy.seed), affinity, lost, protected, lengths, first, strained)
    slots = JOINS[policy.rule](given, policy.combination)
    if policy.matching:
        return match(tokens, slots)
    return regress(tokens, slots) if policy.regression else slots


def merge_layer(
    tokens: Tokens,
    policies: tuple[tuple[Policy, tuple[int, ...]], ...],
    *,
    epsilon: Tensor,
    count: Tensor | None,
    heavy: tuple[int, ...],
) -> Slots:
    """Turn the tokens of one layer into slots, every KV head under its own policy.

    `policies` pairs a policy with the KV heads that follow it; heads that follow none keep every token. `heavy` has one entry
    per pair; the rest is as in `merge_tokens`.
    """
    batch, kv_heads = tokens.keys.shape[:2]
    if len(policies) == 1 and len(policies[0][1]) == kv_heads:
        return merge_tokens(tokens, policies[0][0], epsilon=epsilon, count=count, heavy=heavy[0])
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
    nothing = torch.zeros(tokens.keys.shape[2], device=tokens.keys.device)
    for head in set(range(kv_heads)).difference(*(heads for _, heads in policies)):
        for row in range(batch):
            pieces[row, head] = tokens.keys[row, head], tokens.values[row, head], nothing
    ordered = [pieces[row, head] for row in range(batch) for head in range(kv_heads)]
    keys, values, bias = (torch.cat(parts) for parts in zip(*ordered, strict=True))
    return Slots(keys, values, bias, [len(piece[0]) for piece in ordered])
