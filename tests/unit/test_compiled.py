"""The compiled back end: every codec and dtype in one and in two threads, what it keeps between steps, and life without it."""

import copy
import itertools
import sys

import numpy as np
import pytest
import torch

from kvprofile import KVMerger
from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends.compiled import backend
from kvprofile.runtime.backends.compiled.threads import threads
from kvprofile.runtime.backends.contract import Facts
from kvprofile.runtime.backends.table import BACKENDS, able
from kvprofile.runtime.join import ragged_attention
from kvprofile.runtime.shelf import empty_shelf
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

needs_numba = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))
DIM, VALUE_DIM = 24, 40  # neither a power of two, nor alike
SCALING = 0.25


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_call(*, group, queries=1, dtype=torch.float32, kv_heads=3, batch=2, tail=70, **options):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = drawn(batch, kv_heads * group, queries, DIM)
    # Of a larger store, as the cache's tail; the values' heads lie within their tokens.
    key = drawn(batch, kv_heads, tail + 5, DIM)[:, :, :tail]
    value = drawn(batch, tail, kv_heads, VALUE_DIM).transpose(1, 2)
    return AttentionCall(None, query, key, value, None, {"scaling": SCALING, **options})


def make_slots(call, lengths):
    generator = torch.Generator().manual_seed(4)
    count = sum(lengths)
    keys, values = (torch.randn(count, size, generator=generator).to(call.query.dtype) for size in (DIM, VALUE_DIM))
    return Slots(keys, values, torch.rand(count, generator=generator) * 3, lengths)


def make_shelf(call, slots, codecs=("none", "none"), *, mean=None, weighs=True, size=16, name="compiled"):
    group, capped = call.query.shape[1] // call.key.shape[1], call.softmax.softcap is not None
    facts = Facts(call.key.device, call.query.dtype, DIM, VALUE_DIM, group, capped, codecs)
    shelf = empty_shelf(slots, facts, len(slots.lengths), size, backend=name, mean=mean, weighs=weighs)
    shelf.add(slots, list(range(len(slots.lengths))))
    return shelf


def read(name, vectors, mean=None):
    """Vectors as a codec gives them back."""
    codec = CODECS[name]
    found = codec.decode(codec.encode(vectors, mean), vectors.shape[-1])
    found = turn_back(found) if codec.rotated else found
    return (found if mean is None else found + mean).double().numpy()


def reference(call, keys, values, bias, lengths, unused):  # noqa: PLR0917
    """Output and the tail's mass in float64, one query at a time, over slots as they are read."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, tail = call.key.shape[1:3]
    query, key, value = (part.double().numpy() for part in (call.query, call.key, call.value))
    ends, softmax = np.cumsum([0, *lengths]), call.softmax
    output, mass = np.zeros((batch, queries, heads, VALUE_DIM)), np.zeros((batch, kv_heads, tail))
    for row, head, asked in itertools.product(range(batch), range(heads), range(queries)):
        owner = row * kv_heads + head // (heads // kv_heads)
        old, seen = slice(ends[owner], ends[owner + 1]), range(unused[row], tail - queries + asked + 1)
        logits = np.concatenate([keys[old], key[row, owner % kv_heads, seen]]) @ query[row, head, asked] * SCALING
        if softmax.softcap is not None:
            logits = softmax.softcap * np.tanh(logits / softmax.softcap)
        logits[: old.stop - old.start] += bias[old]
        logits = logits if softmax.sinks is None else np.append(logits, float(softmax.sinks[head]))
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: old.stop - old.start + len(seen)]
        output[row, asked, head] = weights @ np.concatenate([values[old], value[row, owner % kv_heads, seen]])
        mass[row, owner % kv_heads, seen] += weights[old.stop - old.start :]
    return output, mass


LENGTHS = [130, 0, 41, 16, 3, 77]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@needs_numba
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("x-")])
def test_every_codec_in_every_dtype(name, dtype):
    call = make_call(group=7, dtype=dtype)
    slots = make_slots(call, LENGTHS)
    plain = not CODECS[name].rotated
    mean = None if plain else torch.randn(3, DIM, generator=torch.Generator().manual_seed(5))
    heads = [row % 3 for row, length in enumerate(LENGTHS) for _ in range(length)]
    keys = slots.keys if plain else slots.keys.float()
    keys, values = read(name, keys, None if mean is None else mean[heads]), read(name, slots.values)
    bias = (slots.bias if name == "none" else slots.bias.half()).double().numpy()
    shelf = make_shelf(call, slots, (name, name), mean=mean)
    expected, expected_mass = reference(call, keys, values, bias, LENGTHS, [0, 0])
    output, mass = ragged_attention(call, [shelf])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(output.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    np.testing.assert_allclose(mass.double(), expected_mass, rtol=0, atol=TOLERANCE[dtype] * expected_mass.max())


@needs_numba
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"s_aux": torch.linspace(-2, 4, 15)}], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_two_shelves_padding_sinks_and_soft_caps(queries, options):
    """Heads 0 and 2 in int8 beside head 1 as it is; one row's tail begins later than the other's."""
    call = make_call(group=5, queries=queries, **options)
    slots = make_slots(call, LENGTHS)
    parts = [part.split(LENGTHS) for part in (slots.keys, slots.values, slots.bias)]
    shelves, keys, values = [], [None] * 6, [None] * 6
    for codec, rows in (("int8", [0, 2, 3, 5]), ("none", [1, 4])):
        own = Slots(*(torch.cat([part[row] for row in rows]) for part in parts), [LENGTHS[row] for row in rows])
        shelf = make_shelf(call, Slots(own.keys[:0], own.values[:0], own.bias[:0], [0] * 6), (codec, codec))
        shelf.add(own, rows)
        shelves.append(shelf)
        for row in rows:
            keys[row], values[row] = read(codec, parts[0][row]), read(codec, parts[1][row])
    bias = [part if row in (1, 4) else part.half() for row, part in enumerate(parts[2])]
    unused = [0, 66]
    told = np.concatenate(keys), np.concatenate(values), torch.cat([part.double() for part in bias]).numpy()
    expected, expected_mass = reference(call, *told, LENGTHS, unused)
    output, mass = ragged_attention(call, shelves, unused=unused)
    np.testing.assert_allclose(output.double(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mass.double(), expected_mass, rtol=0, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_a_shelf_beside_one_that_it_cannot_serve(codec):
    """Then it gives pieces, which are joined by torch."""
    call = make_call(group=2)
    slots = make_slots(call, LENGTHS)
    found = []
    for name in ("compiled", "blockwise"):
        shelf = make_shelf(call, slots, (codec, codec), name=name)
        other = make_shelf(call, Slots(slots.keys[:0], slots.values[:0], slots.bias[:0], [0] * 6), name="blockwise")
        found.append(ragged_attention(call, [shelf, other]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@needs_numba
def test_slots_that_change_in_place_and_caches_that_are_copied():
    """What is kept between steps never outlives what it was made of."""
    call = make_call(group=3)
    slots = make_slots(call, LENGTHS)
    shelf, beside = (make_shelf(call, slots, name=name) for name in ("compiled", "blockwise"))
    for change in ("none", "copied", "more", "fewer rows"):
        if change == "copied":
            ragged_attention(call, [copy.deepcopy(shelf)])
            shelf = copy.deepcopy(shelf)
        if change == "more":
            for one in (shelf, beside):
                one.add(make_slots(call, LENGTHS), list(range(6)))
        if change == "fewer rows":
            call = make_call(group=3, batch=1)
            for one in (shelf, beside):
                one.select([1], 3)
        torch.testing.assert_close(
            ragged_attention(call, [shelf]), ragged_attention(call, [beside]), rtol=1e-5, atol=1e-5
        )


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad, dtype):
    call = make_call(group=1, dtype=dtype)
    slots = make_slots(call, LENGTHS)
    slots.keys[135] = bad  # of head 2
    output, _ = ragged_attention(call, [make_shelf(call, slots)])
    shown = output.isfinite().all(-1)[:, 0]
    assert shown.tolist() == [[True, True, False], [True, True, True]]


@needs_numba
def test_float16_numbers_are_read_exactly():
    """All of them, subnormal ones too: each is the value of a slot alone."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = torch.cat([numbers[numbers.isfinite()], numbers.new_zeros(32)]).view(-1, VALUE_DIM)
    for part in numbers.split(400):
        query = torch.zeros(len(part), 1, 1, DIM, dtype=torch.float16)
        tail = torch.zeros(len(part), 1, 1, VALUE_DIM, dtype=torch.float16)
        call = AttentionCall(None, query, query, tail, None, {"scaling": 1.0, "s_aux": None})
        slots = Slots(query[:, 0, 0], part, torch.full((len(part),), 100.0), [1] * len(part))
        output, _ = ragged_attention(call, [make_shelf(call, slots, size=16)])
        torch.testing.assert_close(output[:, 0, 0], part, rtol=0, atol=0)


def test_without_numba_torch_serves_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    backend.missing.cache_clear()
    try:
        facts = Facts(torch.device("cpu"), torch.float32, DIM, VALUE_DIM, 3, False)
        assert BACKENDS["compiled"].unable(facts) == "pip install 'kvprofile[fast]' decodes faster on CPUs"
        assert able(facts) == ["blockwise", "headwise"]
        model = tiny_model()
        cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
        model.generate(tiny_text(80), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.backends() == [["blockwise"]] * 2
    finally:
        backend.missing.cache_clear()


@needs_numba
@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are reached on Linux")
def test_it_works_in_torchs_own_threads():
    assert threads() == torch.get_num_threads()
