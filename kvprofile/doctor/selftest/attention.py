"""Our attention over slots and tail on a device, by the back end that serves there, against a float64 loop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends.contract import Facts
from kvprofile.runtime.backends.table import explained
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.shelf import empty_shelf

# The largest error against float64 of outputs of about one: rounding of products, sums and the output itself.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Shape:
    """One kind of attention layer: queries of a group of heads, over slots of heads of different lengths and a tail."""

    name: str
    dim: int
    queries: int = 1
    softcap: float | None = None
    sinks: bool = False
    group: int = 2


SHAPES = (
    Shape("one query", 128),
    Shape("seven query heads a KV head", 64, group=7),
    Shape("several queries", 64, queries=5),
    Shape("many queries", 64, queries=24, group=4),
    Shape("soft cap", 64, softcap=5.0),
    Shape("sinks", 64, sinks=True),
    Shape("head dimension 256", 256),
)


def check_attention(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[str, bool]:
    """The back end that serves this layer against a float64 loop over its heads."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    kv_heads, tail, lengths = 3, 11 + shape.queries, [37, 5, 16]
    query = drawn(1, kv_heads * shape.group, shape.queries, shape.dim)
    key, value = (drawn(1, kv_heads, tail, shape.dim) for _ in range(2))
    sinks = drawn(kv_heads * shape.group).float() if shape.sinks else None
    options = {"scaling": shape.dim**-0.5, "softcap": shape.softcap, "s_aux": sinks}
    call = AttentionCall(None, query, key, value, None, options)
    total = sum(lengths)
    bias = (torch.rand(total, generator=generator) * 3).to(device)
    slots = Slots(drawn(total, shape.dim), drawn(total, shape.dim), bias, lengths)
    facts = Facts(device, dtype, shape.dim, shape.dim, shape.group, shape.softcap is not None)
    shelf = empty_shelf(slots, facts, kv_heads, 16, backend=None, mean=None, weighs=True)
    shelf.add(slots, list(range(kv_heads)))
    output, _ = ragged_attention(call, [shelf], mass=False)
    expected = _reference(call, slots, sinks)
    error = float((output.double().cpu() - expected).abs().max())
    return f"{explained(facts, shape.group * shape.queries)}, error {error:.1e}", error <= TOLERANCE[dtype]


def _reference(call: AttentionCall, slots: Slots, sinks: Tensor | None) -> Tensor:
    """Attention in float64 on the CPU, one head and one query at a time: `(1, queries, heads, dim)`."""
    query, key, value, keys, values, bias = (
        part.double().cpu() for part in (call.query, call.key, call.value, slots.keys, slots.values, slots.bias)
    )
    _, heads, queries, dim = query.shape
    group, tail = heads // key.shape[1], key.shape[2]
    pieces = [part.split(slots.lengths) for part in (keys, values, bias)]
    output = torch.zeros(1, queries, heads, dim, dtype=torch.float64)
    for head in range(heads):
        owner = head // group
        old_keys, old_values, old_bias = (part[owner] for part in pieces)
        for asked in range(queries):
            seen = tail - queries + asked + 1
            logits = torch.cat([old_keys, key[0, owner, :seen]]) @ query[0, head, asked] * call.softmax.scaling
            if call.softmax.softcap is not None:
                logits = call.softmax.softcap * torch.tanh(logits / call.softmax.softcap)
            logits[: len(old_bias)] += old_bias
            if sinks is not None:
                logits = torch.cat([logits, sinks[head, None].double().cpu()])
            weights = torch.softmax(logits, 0)[: len(old_bias) + seen]
            output[0, asked, head] = weights @ torch.cat([old_values, value[0, owner, :seen]])
    return output
