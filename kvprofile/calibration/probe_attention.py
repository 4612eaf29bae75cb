"""Attention of a few queries over a long context that is only referred to: nothing of it is repeated, joined or kept.

Stock attention with a graph keeps, for every layer, the context's keys and values once more for each query head of a group.
Here forward and backward go over the context in pieces (FlashAttention's recomputation, arXiv 2205.14135): what is kept for
the backward is the probe's own queries, keys, values and outputs, and one number a query.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprofile.merging.softmax import Softmax

PIECE_BYTES = 64 * 2**20  # of the logits of one piece


@dataclass(frozen=True)
class Surroundings:
    """All that takes no gradient. The shapes are those of one text, without the batch.

    keys, values `(kv_heads, tokens, dim)`: the context's. mask `(queries, tokens + queries)`: of the context and the probe
    itself, True where a query sees a token or what is added to the logits; None: everything but the future.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    softmax: Softmax

    def pieces(self, rows: int, queries: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys, values and mask of the context in pieces, for `rows` query rows a KV head, of `queries` queries."""
        kv_heads, tokens = self.keys.shape[:2]
        size = max(1, PIECE_BYTES // (4 * kv_heads * rows))
        for low in range(0, tokens, size):
            high = min(tokens, low + size)
            yield (
                self.keys[:, low:high],
                self.values[:, low:high],
                None if self.mask is None else self.mask[:, low:high],
            )

    def among_themselves(self, queries: int) -> Tensor:
        """The mask of the probe's tokens among themselves, `(queries, queries)`."""
        if self.mask is not None:
            return self.mask[:, self.keys.shape[1] :]
        return torch.ones(queries, queries, dtype=torch.bool, device=self.keys.device).tril()

    def logits(self, query: Tensor, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits `(kv_heads, rows, keys)` of the rows `query` `(kv_heads, rows, dim)`, and the cap's slope, if capped."""
        logits = (query @ keys.to(query.dtype).transpose(-1, -2)).mul_(self.softmax.scaling)
        slope = None
        if self.softmax.softcap is not None:
            bent = logits.div_(self.softmax.softcap).tanh_()
            slope = 1 - bent.square()
            logits = bent * self.softmax.softcap
        if mask is not None:
            split = logits.unflatten(1, (-1, len(mask)))
            if mask.dtype == torch.bool:
                split.masked_fill_(~mask, -torch.inf)
            else:
                split.add_(mask)
        return logits, slope


def probe_attention(query: Tensor, key: Tensor, value: Tensor, around: Surroundings) -> Tensor:
    """Attention of a probe over a context and itself: `(queries, heads, value_dim)`, with gradients for the probe.

    `query` `(heads, queries, head_dim)`; `key` and `value` `(kv_heads, queries, dim)` are of the same tokens. Computed in
    float32 where the inputs are in half precision. Every query has to see a token of the probe, its own at least.
    """
    output: Tensor = _ProbeAttention.apply(query, key, value, around)
    return output


class _ProbeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, around: Surroundings) -> Tensor:
        heads, queries, _ = query.shape
        rows = _rows(query, len(key))
        logits, _ = around.logits(rows, key, around.among_themselves(queries))
        top = logits.amax(-1, keepdim=True)
        if around.softmax.sinks is not None:
            sinks = (
                around.softmax.sinks.to(rows.dtype).view(len(key), -1, 1, 1).expand(-1, -1, queries, 1).flatten(1, 2)
            )
            top = torch.maximum(top, sinks)
        weights = torch.exp(logits - top)
        above, below = weights @ value.to(rows.dtype), weights.sum(-1, keepdim=True)
        if around.softmax.sinks is not None:
            below = below + torch.exp(sinks - top)
        for keys, values, mask in around.pieces(rows.shape[1], queries):
            logits, _ = around.logits(rows, keys, mask)
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            weights = logits.sub_(higher).exp_()
            shrunk = torch.exp(top - higher)
            above = above * shrunk + weights @ values.to(rows.dtype)
            below = below * shrunk + weights.sum(-1, keepdim=True)
            top = higher
        output = (above / below).view(heads, queries, -1).transpose(0, 1).to(query.dtype).contiguous()
        ctx.around = around
        ctx.save_for_backward(query, key, value, output, top + below.log())
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, total = ctx.saved_tensors
        around: Surroundings = ctx.around
        heads, queries, _ = query.shape
        rows, slope = _rows(query, len(key)), _rows(gradients[0].transpose(0, 1), len(key))
        # What a weight's gradient is measured from: the gradient along the output itself.
        along = (slope * _rows(output.transpose(0, 1), len(key))).sum(-1, keepdim=True)

        def back(keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            """The weights of a piece, and the gradient of its logits before cap and mask, both `(kv_heads, rows, keys)`."""
            logits, bend = around.logits(rows, keys, mask)
            weights = logits.sub_(total).exp_()
            change = (
                (slope @ values.to(rows.dtype).transpose(-1, -2)).sub_(along).mul_(weights).mul_(around.softmax.scaling)
            )
            return weights, change if bend is None else change.mul_(bend)

        weights, change = back(key, value, around.among_themselves(queries))
        for_key, for_value = change.transpose(-1, -2) @ rows, weights.transpose(-1, -2) @ slope
        for_query = change @ key.to(rows.dtype)
        for keys, values, mask in around.pieces(rows.shape[1], queries):
            for_query += back(keys, values, mask)[1] @ keys.to(rows.dtype)
        return (
            for_query.view(heads, queries, -1).to(query.dtype),
            for_key.to(key.dtype),
            for_value.to(value.dtype),
            None,
        )


def _rows(query: Tensor, kv_heads: int) -> Tensor:
    """`(heads, queries, dim)` as `(kv_heads, group * queries, dim)`, in float32 at least."""
    exact = query.float() if query.dtype in (torch.float16, torch.bfloat16) else query
    return exact.reshape(kv_heads, -1, query.shape[-1])
