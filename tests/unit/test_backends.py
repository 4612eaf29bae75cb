"""Every back end against one float64 loop over rows, heads and queries."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends import headwise, ragged_attention, suited, varlen
from kvprofile.runtime.backends.blockwise import blockwise_attention
from kvprofile.runtime.backends.headwise import headwise_attention
from kvprofile.runtime.backends.varlen import varlen_attention, widened
from kvprofile.runtime.blocks import append, empty_blocks

SCALING = 0.3
SIZE = 8  # slots of a block
# How far from float64 the output of unit values may be: rounding of inputs' products, and of the output itself.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_call(*, batch=2, kv_heads=2, group=3, queries=1, tail=9, dtype=torch.float32, device="cpu", **options):
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = drawn(batch, kv_heads * group, queries, 16)
    # The tail is a slice of a larger store, as in the cache.
    key, value = (drawn(batch, kv_heads, tail + 3, size)[:, :, :tail] for size in (16, 16))
    return AttentionCall(torch.nn.Identity(), query, key, value, None, {"scaling": SCALING, **options})


def make_slots(call, lengths):
    generator = torch.Generator().manual_seed(2)
    count = sum(lengths)
    keys, values = (torch.randn(count, 16, generator=generator).to(call.key) for _ in range(2))
    return Slots(keys, values, (torch.rand(count, generator=generator) * 3).to(call.key.device), lengths)


def left_padding(call, counts):
    return torch.arange(call.key.shape[2])[None] < torch.tensor(counts)[:, None]


def reference(call, slots, padding=None, sinks=None):
    """Output `(batch, queries, heads, value_dim)` and mass `(batch, kv_heads, tail)`, one query at a time."""
    query, key, value, old_keys, old_values, bias = (
        part.double().cpu().numpy() for part in (call.query, call.key, call.value, slots.keys, slots.values, slots.bias)
    )
    batch, heads, queries, _ = query.shape
    kv_heads, tail = key.shape[1:3]
    ends = np.cumsum([0, *slots.lengths])
    output, mass = np.zeros((batch, queries, heads, value.shape[-1])), np.zeros((batch, kv_heads, tail))
    for row, head, asked in itertools.product(range(batch), range(heads), range(queries)):
        owner = head // (heads // kv_heads)
        old = slice(ends[row * kv_heads + owner], ends[row * kv_heads + owner + 1])
        seen = [token for token in range(tail - queries + asked + 1) if padding is None or not padding[row, token]]
        keys = np.concatenate([old_keys[old], key[row, owner, seen]])
        logits = keys @ query[row, head, asked] * call.scaling
        if call.softcap is not None:
            logits = call.softcap * np.tanh(logits / call.softcap)
        logits[: old.stop - old.start] += bias[old]
        if sinks is not None:
            logits = np.append(logits, float(sinks[head]))
        if not seen and old.stop == old.start:
            continue  # a padded query of an empty head: whatever comes out is not looked at
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: len(keys)]
        output[row, asked, head] = weights @ np.concatenate([old_values[old], value[row, owner, seen]])
        if padding is None or not padding[row, tail - queries + asked]:
            mass[row, owner, seen] += weights[old.stop - old.start :]
    return output, mass


def check(backend, call, slots, padding=None, sinks=None):
    expected, expected_mass = reference(call, slots, padding, sinks)
    device = call.key.device
    padding, sinks = (None if part is None else part.to(device) for part in (padding, sinks))
    output, mass = backend(call, slots, padding=padding, sinks=sinks, mass=True)
    tolerance = TOLERANCE[call.query.dtype]
    assert output.dtype == call.value.dtype
    assert output.is_contiguous()
    shown = output.double().cpu().numpy()
    if padding is not None:
        asking = padding[:, call.key.shape[2] - call.query.shape[2] :].cpu().numpy()
        assert np.isfinite(shown).all()
        shown, expected = shown[~asking], expected[~asking]
    np.testing.assert_allclose(shown, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(mass.double().cpu().numpy(), expected_mass, rtol=0, atol=tolerance * expected_mass.max())
    alone, nothing = backend(call, slots, padding=padding, sinks=sinks, mass=False)
    np.testing.assert_allclose(alone.double().cpu(), output.double().cpu(), rtol=0, atol=2 * tolerance)
    assert nothing is None


def packed_reference(query, held, query_ends, block_ends, lengths, *, scaling):
    """What the CUDA kernel promises, one sequence at a time: nothing to see gives 0 and +inf."""
    output, total = torch.zeros_like(query), torch.full((len(query),), torch.inf)
    keys, values = held.keys.flatten(0, 1), held.values.flatten(0, 1)
    for sequence, length in enumerate(lengths.tolist()):
        asked = slice(*query_ends[sequence : sequence + 2])
        begin, end = block_ends[sequence : sequence + 2].tolist()
        assert 0 <= end - begin - length < SIZE
        if length:
            old = slice(begin, begin + length)
            logits = query[asked].double() @ keys[old].double().T * scaling
            output[asked] = (logits.softmax(-1) @ values[old].double()).to(query.dtype)
            total[asked] = logits.logsumexp(-1).float()
    return output, total


@pytest.fixture(autouse=True)
def _kernel(monkeypatch, request):
    if "gpu" not in request.keywords:
        monkeypatch.setattr(varlen, "packed_attention", packed_reference)


def in_blocks(slots):
    heads = list(range(len(slots.lengths)))
    # So small that the few slots of these tests fill several and leave some half empty.
    return append(empty_blocks(slots, len(heads), SIZE), slots, heads)


def by_blocks(call, slots, **options):
    return blockwise_attention(call, in_blocks(slots), **options)


def by_heads(call, slots, **options):
    return headwise_attention(call, in_blocks(slots), **options)


def through_kernel(call, slots, **options):
    return varlen_attention(call, in_blocks(widened(slots)), **options)


def as_stored(call, slots, **options):
    return ragged_attention(call, in_blocks(suited(slots, call)), **options)


BACKENDS = {"blockwise": by_blocks, "headwise": by_heads, "varlen": through_kernel}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", BACKENDS)
def test_heads_of_different_lengths(name, queries, group, dtype):
    call = make_call(queries=queries, group=group, dtype=dtype)
    check(BACKENDS[name], call, make_slots(call, [7, 30, 0, 12]))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", BACKENDS)
def test_softcap_sinks_and_padding(name, queries, padded, sinks, softcap):
    if name == "varlen" and softcap is not None:
        pytest.skip("the kernel knows no soft cap, and such layers never get there")
    call = make_call(queries=queries, batch=3, softcap=softcap)
    padding = left_padding(call, [0, 4, 8]) if padded else None
    extra = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -4.0]) if sinks else None
    check(BACKENDS[name], call, make_slots(call, [7, 30, 5, 12, 0, 0]), padding, extra)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_slots_at_all(name):
    call = make_call(queries=2)
    check(BACKENDS[name], call, make_slots(call, [0, 0, 0, 0]))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_many_queries_a_few_at_a_time(monkeypatch, softcap):
    monkeypatch.setattr(headwise, "LOGITS", 0)
    monkeypatch.setattr(headwise, "LEAST", 6)  # two queries of this call's three heads at a time
    call = make_call(queries=9, softcap=softcap)
    extra = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -4.0])
    check(by_heads, call, make_slots(call, [7, 30, 0, 12]), left_padding(call, [3, 0]), extra)


@pytest.mark.parametrize("name", ["blockwise", "headwise"])
def test_logits_so_large_that_they_would_overflow_unshifted(name):
    call = make_call(queries=3)
    call.query.mul_(80)
    check(BACKENDS[name], call, make_slots(call, [7, 30, 0, 12]))


def test_many_queries_keep_few_logits_alive(monkeypatch):
    """The largest tensor of a forward of many queries is far below all of its logits."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            largest.append(max(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor)))
            return made

    monkeypatch.setattr(headwise, "LOGITS", 1 << 12)
    call = make_call(queries=256, tail=256)
    slots = in_blocks(make_slots(call, [70, 300, 0, 120]))
    with Sizes():
        ragged_attention(call, slots)
    assert max(largest) <= max(1 << 15, call.query.numel())  # all logits of one head are 427,008
    assert len(largest) < 10_000


def test_the_processor_is_served_by_blocks_and_keeps_its_slots_narrow():
    call = make_call(queries=2)
    slots = make_slots(call, [7, 30, 0, 12])
    assert suited(slots, call) is slots
    check(as_stored, call, slots)


def test_wide_slots_go_to_the_kernel():
    call = make_call(queries=2)
    slots = make_slots(call, [7, 30, 0, 12])
    check(lambda call, slots, **options: ragged_attention(call, in_blocks(widened(slots)), **options), call, slots)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_on_a_gpu(softcap, sinks, padded, queries, dtype):
    call = make_call(queries=queries, dtype=dtype, device="cuda", softcap=softcap)
    slots = make_slots(call, [7, 30, 0, 12])
    padding = left_padding(call, [0, 4]) if padded else None
    extra = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -4.0]) if sinks else None
    check(as_stored, call, slots, padding, extra)
    check(by_blocks, call, slots, padding, extra)
    check(by_heads, call, slots, padding, extra)
