"""Biases and values solved for, so that queries asked again get what they got: Attention Matching (arXiv 2602.16284)."""

from functools import reduce

import torch
from torch import Tensor

from kvprofile.merging.padding import pad
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Queries, Tokens

RIDGE = 1e-2
LEAST, MOST = -0.9, 9.0  # by how much of itself a slot's weight changes


def match(tokens: Tokens, slots: Slots) -> Slots:
    """Change biases so that the slots receive the tokens' attention, then values so that the outputs stay the same.

    With A the exponentiated logits of the queries that are asked again over the slots, in units of their softmax over all
    tokens, and m the attention to the tokens, weights exp(bias) are multiplied by 1 + u, u = A'(AA' + lambda I)^-1 (m - A1),
    within bounds that keep them positive. With A the attention over the slots that comes of it and O the outputs over the
    tokens, values change by A'(AA' + lambda I)^-1 (O - AV); lambda = 0.01. Deviations from the paper: a ridge about what a
    slot is by its policy takes the place of non-negative least squares from nothing, and the queries are the prompt's
    own, turned on to where it ends (`tokens.asked_again`), without another forward.

    The safe path: a head takes both only if the squared error of the outputs falls, in the precision they are stored in, and
    only if it has lost tokens at all; a head for which a factorisation fails stays as it is. So do all slots where no
    such queries are at hand, as in every piece after the first: other slots share the softmax there.
    """
    if tokens.again is None or not sum(slots.lengths):
        return slots
    own, asked = pad(slots, tokens.keys.shape[1]), _Asked(tokens.again, tokens)
    given = asked.over(own.keys, own.bias)
    raised, failed = _ridge(given, asked.mass - given.sum(-1, keepdim=True))
    bias = own.bias + raised[..., 0].clamp(LEAST, MOST).log1p()
    weights, rest = asked.shares(asked.over(own.keys, bias))
    added, failed_too = _ridge(weights, asked.wanted - rest - weights @ own.values)
    values = (own.values + added).to(slots.values.dtype).float()
    better = asked.error(weights, rest, values) < asked.error(*asked.shares(given), own.values)
    better &= (failed == 0) & (failed_too == 0) & (own.lengths < tokens.keys.shape[2])
    values = torch.where(better[..., None, None], values, own.values)
    bias = torch.where(better[..., None], bias, own.bias)
    return Slots(slots.keys, own.packed(values).to(slots.values.dtype), own.packed(bias), slots.lengths)


class _Asked:
    """What the queries, `group * queries` rows a KV head, get from all tokens.

    wanted `(batch, kv_heads, rows, value_dim)`: outputs. mass `(batch, kv_heads, rows, 1)`: attention to the tokens at hand.
    """

    def __init__(self, queries: Queries, tokens: Tokens) -> None:
        self.queries = queries
        old, newer = queries.logits(tokens.keys), queries.logits(queries.keys)
        sinks = newer.new_full((1, 1, 1, 1, 1), -torch.inf) if queries.sinks is None else queries.sinks[..., None, None]
        tops = (part.amax(-1, keepdim=True) for part in (old, newer, sinks) if part.shape[-1])
        self.top = reduce(torch.maximum, tops)
        old, newer = (part.sub_(self.top).exp_().flatten(2, 3) for part in (old, newer))
        rest = newer.sum(-1, keepdim=True) + torch.exp(sinks - self.top).flatten(2, 3)
        self.total = old.sum(-1, keepdim=True) + rest
        self.rest, self.recent = rest / self.total, newer @ queries.values.float() / self.total
        self.wanted = old @ tokens.values.float() / self.total + self.recent
        self.mass = 1 - self.rest

    def over(self, keys: Tensor, bias: Tensor) -> Tensor:
        """Exponentiated logits `(batch, kv_heads, rows, slots)` over slots, in units of the softmax over all tokens."""
        logits = self.queries.logits(keys).add_(bias[:, :, None, None]).sub_(self.top)
        return logits.exp_().flatten(2, 3).div_(self.total)

    def shares(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The slots' attention, and what the newer tokens add to the outputs, once the slots stand for the tokens."""
        total = given.sum(-1, keepdim=True) + self.rest
        return given / total, self.recent / total

    def error(self, weights: Tensor, rest: Tensor, values: Tensor) -> Tensor:
        """Squared error of the outputs `(batch, kv_heads)`."""
        return (self.wanted - rest - weights @ values).square().sum((-1, -2))


def _ridge(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The x `(..., columns, n)` that minimises |matrix x - target|^2 + lambda |x|^2, and where no factor was found, nonzero.

    The smaller of the two Gram matrices of `matrix` `(..., rows, columns)` is factorised.
    """
    rows, columns = matrix.shape[-2:]
    turned = matrix.transpose(-1, -2)
    gram = matrix @ turned if rows <= columns else turned @ matrix
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if rows <= columns:
        return turned @ torch.cholesky_solve(target, factor), failed
    return torch.cholesky_solve(turned @ target, factor), failed
