"""Values mended after any policy, so that the newest queries get what they got before: GRKV (arXiv 2605.31105)."""

from functools import reduce

import torch
from torch import Tensor

from kvprofile.merging.padding import pad
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Tokens

WINDOW = 32  # queries whose outputs are to match
RIDGE = 1e-2
FROZEN = 0.1  # share of the slots, the most attended, whose values stay


def regress(tokens: Tokens, slots: Slots) -> Slots:
    """Change the slots' values by dV = A'(AA' + lambda I)^-1 (O - AV).

    A is the attention of the newest 32 queries of the group over the slots (their share of a softmax that also covers the
    recent tokens), O their outputs over the tokens as they were, lambda = 0.01; the tenth of the slots that receives most
    keeps its values. The safe path: a head takes the change only if the squared error falls, in the precision it is
    stored in, and only if it has lost tokens at all. AA' + lambda I is positive definite, so it is solved by Cholesky's
    factorisation; a head for which rounding or a value that is no number makes that fail keeps its values too.

    Queries that do not see all of the merged tokens are left out; without any the slots stay as they are. So does every piece
    after the first: its queries are gone and other slots share the softmax.
    """
    queries = tokens.queries
    if queries is None or not min(WINDOW, queries.keys.shape[2]) or not sum(slots.lengths):
        return slots
    queries = queries.newest(min(WINDOW, queries.keys.shape[2]))
    kv_heads, group, asked = queries.states.shape[1:4]
    padded = pad(slots, kv_heads)
    keys, values, lengths = padded.keys, padded.values, padded.lengths

    before, after = queries.logits(tokens.keys), queries.logits(keys)
    after += padded.bias[:, :, None, None]
    newer, count = queries.logits(queries.keys), queries.keys.shape[2]
    own = torch.arange(asked, device=keys.device) + count - asked
    newer = newer.masked_fill(torch.arange(count, device=keys.device) > own[:, None], -torch.inf)
    sinks = newer.new_full((1, 1, 1, 1, 1), -torch.inf) if queries.sinks is None else queries.sinks[..., None, None]
    top = reduce(torch.maximum, (part.amax(-1, keepdim=True) for part in (before, after, newer, sinks)))
    before, after, newer = (part.sub_(top).exp_().flatten(2, 3) for part in (before, after, newer))
    sinks = torch.exp(sinks - top).flatten(2, 3)
    rest = newer.sum(-1, keepdim=True) + sinks
    recent = newer @ queries.values.float()
    wanted = (before @ tokens.values.float() + recent) / (before.sum(-1, keepdim=True) + rest)
    total = after.sum(-1, keepdim=True) + rest
    weights, recent = after / total, recent / total

    error = wanted - recent - weights @ values
    free = weights * ~_most_attended(weights.sum(2), lengths)[:, :, None]
    gram = free @ free.transpose(-1, -2) + RIDGE * torch.eye(group * asked, device=keys.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    changed = values + free.transpose(-1, -2) @ torch.cholesky_solve(error, factor)
    changed = changed.to(slots.values.dtype).float()
    better = (wanted - recent - weights @ changed).square().sum((-1, -2)) < error.square().sum((-1, -2))
    better &= (failed == 0) & (lengths < tokens.keys.shape[2])
    values = padded.packed(torch.where(better[..., None, None], changed, values))
    return Slots(slots.keys, values.to(slots.values.dtype), slots.bias, slots.lengths)


def _most_attended(received: Tensor, lengths: Tensor) -> Tensor:
    """Mark the tenth of every head's slots that receives most, `(batch, kv_heads, slots)`; at least one."""
    frozen = (lengths * FROZEN).ceil().long()
    rank = received.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < frozen[..., None]
