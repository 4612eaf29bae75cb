"""Every back end against one float64 loop over rows, heads and queries."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.merging.slots import Slots
from kvprofile.runtime import join
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends import headwise, triton_decode, varlen
from kvprofile.runtime.backends.compiled.backend import missing
from kvprofile.runtime.backends.contract import Facts, always
from kvprofile.runtime.backends.table import BACKENDS, able, check_backend, serving
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.shelf import empty_shelf

SCALING = 0.3
SIZE = 8  # slots of a block
# How far from float64 the output of unit values may be: rounding of inputs' products, and of the output itself.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_call(
    *, batch=2, kv_heads=2, group=3, queries=1, tail=9, dtype=torch.float32, device="cpu", sinks=None, **options
):
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = drawn(batch, kv_heads * group, queries, 16)
    # The tail is a slice of a larger store, as in the cache.
    key, value = (drawn(batch, kv_heads, tail + 3, size)[:, :, :tail] for size in (16, 16))
    sinks = None if sinks is None else sinks.to(device)
    return AttentionCall(torch.nn.Identity(), query, key, value, None, {"scaling": SCALING, "s_aux": sinks, **options})


def make_slots(call, lengths):
    generator = torch.Generator().manual_seed(2)
    count = sum(lengths)
    keys, values = (torch.randn(count, 16, generator=generator).to(call.key) for _ in range(2))
    return Slots(keys, values, (torch.rand(count, generator=generator) * 3).to(call.key.device), lengths)


def reference(call, slots, unused=None):
    """Output `(batch, queries, heads, value_dim)` and mass `(batch, kv_heads, tail)`, one query at a time."""
    query, key, value, old_keys, old_values, bias = (
        part.double().cpu().numpy() for part in (call.query, call.key, call.value, slots.keys, slots.values, slots.bias)
    )
    batch, heads, queries, _ = query.shape
    kv_heads, tail = key.shape[1:3]
    ends, sinks = np.cumsum([0, *slots.lengths]), call.softmax.sinks
    output, mass = np.zeros((batch, queries, heads, value.shape[-1])), np.zeros((batch, kv_heads, tail))
    for row, head, asked in itertools.product(range(batch), range(heads), range(queries)):
        owner = head // (heads // kv_heads)
        old = slice(ends[row * kv_heads + owner], ends[row * kv_heads + owner + 1])
        newest = tail - queries + asked
        seen = range(unused[row] if unused else 0, newest + 1)
        keys = np.concatenate([old_keys[old], key[row, owner, seen]])
        logits = keys @ query[row, head, asked] * call.softmax.scaling
        if call.softmax.softcap is not None:
            logits = call.softmax.softcap * np.tanh(logits / call.softmax.softcap)
        logits[: old.stop - old.start] += bias[old]
        if sinks is not None:
            logits = np.append(logits, float(sinks[head]))
        if not seen and old.stop == old.start:
            continue  # a padded query of an empty head: whatever comes out is not looked at
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: len(keys)]
        output[row, asked, head] = weights @ np.concatenate([old_values[old], value[row, owner, seen]])
        if newest in seen:
            mass[row, owner, seen] += weights[old.stop - old.start :]
    return output, mass


def check(name, call, slots, unused=None, *, logits=1):
    """The back end of that name, or whoever serves, against the loop; `logits` larger than usual are that much less exact."""
    expected, expected_mass = reference(call, slots, unused)
    shelves = [shelved(call, slots, name)]
    output, mass = ragged_attention(call, shelves, unused=unused)
    tolerance = TOLERANCE[call.query.dtype] * logits
    assert output.dtype == call.value.dtype
    assert output.is_contiguous()
    shown = output.double().cpu().numpy()
    if unused is not None:
        asking = np.arange(call.key.shape[2] - call.query.shape[2], call.key.shape[2]) >= np.array(unused)[:, None]
        assert np.isfinite(shown).all()
        shown, expected = shown[asking], expected[asking]
    np.testing.assert_allclose(shown, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(mass.double().cpu().numpy(), expected_mass, rtol=0, atol=tolerance * expected_mass.max())
    alone, nothing = ragged_attention(call, shelves, unused=unused, mass=False)
    np.testing.assert_allclose(alone.double().cpu(), output.double().cpu(), rtol=0, atol=2 * tolerance)
    assert nothing is None


def packed_reference(query, held, query_ends, block_ends, lengths, *, scaling):
    """What the CUDA kernel promises, one sequence at a time: nothing to see gives 0 and +inf."""
    output, total = torch.zeros_like(query), torch.full((len(query),), torch.inf)
    keys, values = held.keys[0].flatten(0, 1), held.values[0].flatten(0, 1)
    for sequence, length in enumerate(lengths.tolist()):
        asked = slice(*query_ends[sequence : sequence + 2])
        begin, end = block_ends[sequence : sequence + 2].tolist()
        assert 0 <= length <= end - begin
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
        monkeypatch.setattr(triton_decode, "_multiprocessors", lambda _device: 4)


def facts_of(call):
    group = call.query.shape[1] // call.key.shape[1]
    return Facts(call.key.device, call.key.dtype, 16, 16, group, call.softmax.softcap is not None)


def shelved(call, slots, name=None):
    heads = list(range(len(slots.lengths)))
    with pytest.MonkeyPatch.context() as patch:
        # The one's kernel is replaced by a reference, the other's run in Triton's interpreter.
        if name in ("varlen", "triton") and call.key.device.type == "cpu":
            patch.setitem(BACKENDS, name, replace(BACKENDS[name], unable=always))
        # Blocks so small that the few slots of these tests fill several and leave some half empty.
        shelf = empty_shelf(slots, facts_of(call), len(heads), SIZE, backend=name, mean=None, weighs=True)
    shelf.add(slots, heads)
    return shelf


COMPILED = pytest.param("compiled", marks=pytest.mark.skipif(missing() is not None, reason=str(missing())))
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(not triton_decode.installed(), reason="triton is not installed")
)
NAMES = [{"compiled": COMPILED, "triton": TRITON}.get(name, name) for name in BACKENDS]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -4.0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_heads_of_different_lengths(name, queries, group, dtype):
    call = make_call(queries=queries, group=group, dtype=dtype)
    check(name, call, make_slots(call, [7, 30, 0, 12]))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_softcap_sinks_and_padding(name, queries, padded, sinks, softcap):
    if name == "varlen" and softcap is not None:
        pytest.skip("the kernel knows no soft cap, and such layers never get there")
    call = make_call(queries=queries, batch=3, softcap=softcap, sinks=SINKS if sinks else None)
    check(name, call, make_slots(call, [7, 30, 5, 12, 0, 0]), [0, 4, 8] if padded else None)


@pytest.mark.parametrize("name", NAMES)
def test_no_slots_at_all(name):
    call = make_call(queries=2)
    check(name, call, make_slots(call, [0, 0, 0, 0]))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_many_queries_a_few_at_a_time(monkeypatch, softcap):
    for module in (join, headwise):
        monkeypatch.setattr(module, "LOGITS", 0)
        monkeypatch.setattr(module, "LEAST", 6)  # two queries of this call's three heads at a time
    call = make_call(queries=9, softcap=softcap, sinks=SINKS)
    check("headwise", call, make_slots(call, [7, 30, 0, 12]), [3, 0])


@pytest.mark.parametrize("name", [COMPILED, TRITON, "blockwise", "headwise"])
def test_logits_so_large_that_they_would_overflow_unshifted(name):
    call = make_call(queries=3)
    call.query.mul_(80)
    check(name, call, make_slots(call, [7, 30, 0, 12]), logits=10)


def test_many_queries_keep_few_logits_alive(monkeypatch):
    """The largest tensor of a forward of many queries is far below all of its logits."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            largest.append(max(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor)))
            return made

    for module in (join, headwise):
        monkeypatch.setattr(module, "LOGITS", 1 << 12)
    call = make_call(queries=256, tail=256)
    shelf = shelved(call, make_slots(call, [70, 300, 0, 120]))
    with Sizes():
        ragged_attention(call, [shelf])
    assert max(largest) <= max(1 << 15, call.query.numel())  # all logits of one head are 427,008
    assert len(largest) < 10_000


def test_the_first_that_is_able_serves_and_a_call_may_fall_to_the_next():
    call = make_call(queries=2)
    assert [name for name in able(facts_of(call)) if name != "compiled"] == ["blockwise", "headwise"]
    assert [serving(["blockwise", "headwise"], queries) for queries in (1, 16, 17)] == [
        "blockwise",
        "blockwise",
        "headwise",
    ]
    shelf = shelved(call, make_slots(call, [7, 30, 0, 12]))
    assert shelf.blocks.keys[0].shape[-1] == 16  # no room for a bias
    with pytest.raises(KVProfileError, match=r"varlen cannot serve this layer: the kernel is CUDA's; ask for another"):
        able(facts_of(call), "varlen")
    with pytest.raises(
        UsageError, match=r"unknown back end 'flashy'; expected one of triton, varlen, compiled, blockwise, headwise$"
    ):
        check_backend("flashy")


@pytest.mark.parametrize("name", [COMPILED, "blockwise", "headwise"])
def test_slots_made_for_the_kernel_are_read_by_all(name):
    call = make_call(queries=2)
    slots = make_slots(call, [7, 30, 0, 12])
    shelf = shelved(call, slots, "varlen")
    shelf.servers = [name]
    output, _ = ragged_attention(call, [shelf])
    np.testing.assert_allclose(output.double(), reference(call, slots)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [None, COMPILED, "blockwise", "headwise"])
def test_heads_on_shelves_of_their_own(name):
    """Two heads on one shelf and two on another are what all four are on one."""
    call = make_call(queries=3, sinks=SINKS)
    slots = make_slots(call, [7, 30, 5, 12])
    parts = [part.split(slots.lengths) for part in (slots.keys, slots.values, slots.bias)]
    shelves = []
    for rows in ([0, 2], [1, 3]):
        shelf = empty_shelf(slots, facts_of(call), 4, SIZE, backend=name, mean=None, weighs=True)
        own = (torch.cat([part[row] for row in rows]) for part in parts)
        shelf.add(Slots(*own, [slots.lengths[row] for row in rows]), rows)
        shelves.append(shelf)
    expected, expected_mass = reference(call, slots)
    output, mass = ragged_attention(call, shelves)
    np.testing.assert_allclose(output.double(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mass.double(), expected_mass, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_on_a_gpu(softcap, sinks, padded, queries, dtype):
    call = make_call(queries=queries, dtype=dtype, device="cuda", softcap=softcap, sinks=SINKS if sinks else None)
    slots = make_slots(call, [7, 30, 0, 12])
    able_too = [name for name in ("triton", "varlen") if name in able(facts_of(call))]
    for name in (None, *able_too, "blockwise", "headwise"):
        check(name, call, slots, [0, 4] if padded else None)
