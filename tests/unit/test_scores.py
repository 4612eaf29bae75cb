"""Attention received, against the full softmax matrix in float64, and the affinities made from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.merging.affinity import AFFINITIES
from kvprofile.merging.scores import (
    MASS_STRIDE,
    MOST_ASKED,
    POOL,
    QUERY_BLOCK,
    attention_mass,
    mass_stride,
    pooled,
    window_mass,
)
from kvprofile.merging.softmax import Softmax
from kvprofile.merging.tokens import mean_attention
from tests.unit.builders import WINDOWS, random_tokens
from tests.unit.reference import PROPERTY, affinities, attention_weights, head_of, mass_of

SCALING = 0.4


def _inputs(seed, *, batch=1, kv_heads=2, group=1, queries=10, tokens=10, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, queries, 4, generator=generator) * sharpness
    return query, torch.randn(batch, kv_heads, tokens, 4, generator=generator) * sharpness


def _expected(query, key, rows, softcap=None):
    weights = [
        attention_weights(heads, keys, SCALING, softcap)
        for heads, keys in zip(query.double().numpy(), key.double().numpy(), strict=True)
    ]
    return np.stack([mass_of(matrix, key.shape[1], rows) for matrix in weights])


@settings(PROPERTY, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    queries=st.integers(1, 9),
    older=st.integers(0, 6),
    softcap=st.sampled_from([None, 1.5, 50.0]),
    stride=st.integers(1, 5),
)
def test_mass_is_the_column_sum_of_the_attention_matrix(*, seed, heads, queries, older, softcap, stride):
    batch, kv_heads, group = heads
    query, key = _inputs(seed, batch=batch, kv_heads=kv_heads, group=group, queries=queries, tokens=queries + older)
    mass = attention_mass(query, key, Softmax(SCALING, softcap=softcap), stride=stride)
    assert mass.dtype == torch.float32
    rows = [row for row in range(queries) if (queries - 1 - row) % stride == 0]
    expected = _expected(query, key, rows, softcap) * queries / len(rows)
    np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-5, atol=1e-5)
    # Every query hands out exactly 1, and all are counted whatever the stride.
    np.testing.assert_allclose(mass.sum(-1).numpy(), group * queries, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 15, 16, 2048, 8191, 8192, 8193, 10_000, 32_768, 131_072])
def test_the_estimate_takes_every_16th_query_and_of_many_a_few_hundred(queries):
    stride = mass_stride(queries)
    assert (stride == MASS_STRIDE) == (queries <= 8192)
    assert min(queries, 8192) / 17 <= len(range(0, queries, stride)) <= MOST_ASKED


@pytest.mark.parametrize(
    ("queries", "stride"),
    [(QUERY_BLOCK - 1, 1), (QUERY_BLOCK, 1), (QUERY_BLOCK + 1, 1), (150, 2), (150, MASS_STRIDE), (150, 500)],
)
def test_mass_over_several_blocks_of_queries(queries, stride):
    query, key = _inputs(3, kv_heads=1, group=2, queries=queries, tokens=160)
    rows = range(queries - 1, -1, -stride)
    mass = attention_mass(query, key, Softmax(SCALING), stride=stride).numpy()
    np.testing.assert_allclose(mass, _expected(query, key, rows) * queries / len(rows), rtol=1e-5, atol=1e-4)


def test_sinks_take_their_part_of_every_query():
    query, key = _inputs(6, batch=2, kv_heads=2, group=2, queries=9, tokens=12)
    sinks = torch.tensor([0.3, -2.0, 1.5, 4.0])
    mass = attention_mass(query, key, Softmax(SCALING, sinks=sinks), stride=2).double().numpy()
    expected = np.zeros(mass.shape)
    for row, head, asked in np.ndindex(2, 4, 5):
        seen = 2 * asked + 4
        logits = SCALING * key[row, head // 2, :seen].double().numpy() @ query[row, head, 2 * asked].double().numpy()
        weights = np.exp(logits)
        expected[row, head // 2, :seen] += weights / (weights.sum() + np.exp(sinks[head].item())) * 9 / 5
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-5)
    everything = window_mass(query, key, Softmax(SCALING, sinks=sinks), window=9)
    torch.testing.assert_close(everything, pooled(attention_mass(query, key, Softmax(SCALING, sinks=sinks))))


def test_a_strided_mass_is_the_mass_of_those_queries_alone():
    query, key = _inputs(4, queries=40, tokens=40)
    strided = attention_mass(query, key, Softmax(SCALING), stride=7)
    alone = sum(
        attention_mass(query[:, :, row : row + 1], key[:, :, : row + 1], Softmax(SCALING))[..., :1] for row in [4, 11]
    )
    # The oldest key is seen by every query: sum them one at a time, each as the newest of a shorter text.
    for row in (18, 25, 32, 39):
        alone = alone + attention_mass(query[:, :, row : row + 1], key[:, :, : row + 1], Softmax(SCALING))[..., :1]
    torch.testing.assert_close(strided[..., :1], alone * 40 / 6)


def test_mass_takes_half_precision():
    query, key = (part.bfloat16() for part in _inputs(5, queries=20, tokens=20, sharpness=0.5))
    mass = attention_mass(query, key, Softmax(SCALING))
    assert mass.dtype == torch.float32
    expected = _expected(query.float(), key.float(), range(20))
    np.testing.assert_allclose(mass.numpy(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("queries", "tokens"), [(1, 1), (1, 9), (3, 3), (20, 25), (32, 32), (50, 50), (40, 90), (140, 150)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 32, 128])
def test_window_mass_is_the_newest_queries_pooled_over_neighbours(queries, tokens, softcap, window):
    query, key = _inputs(6, batch=2, kv_heads=2, group=2, queries=queries, tokens=tokens)
    received = _expected(query, key, range(max(0, queries - window), queries), softcap)
    expected = np.zeros_like(received)
    for token in range(tokens):
        near = [other for other in range(tokens) if abs(other - token) <= POOL // 2]
        expected[..., token] = sum(received[..., other] for other in near) / len(near)
    found = window_mass(query, key, Softmax(SCALING, softcap=softcap), window=window)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 12),
    position=st.integers(0, 50),
    newer=st.integers(0, 40),
    name=st.sampled_from(list(AFFINITIES)),
)
def test_affinities_are_the_loops(*, seed, count, position, newer, name):
    tokens = random_tokens(seed, batch=2, heads=2, count=count, position=position, newer=newer)
    found = AFFINITIES[name](tokens)
    assert found.shape == (2, 2, count)
    for row in range(2):
        for head in range(2):
            expected = affinities(name, head_of(tokens, row, head))
            np.testing.assert_allclose(found[row, head].numpy(), expected, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(seed=st.integers(0, 2**31), power=st.integers(-10, 10), name=st.sampled_from(list(AFFINITIES)))
def test_more_attention_for_all_changes_nothing(seed, power, name):
    tokens = random_tokens(seed, count=10)
    # A power of two, so that not even rounding changes.
    windows = {size: received * 2.0**power for size, received in tokens.windows.items()}
    louder = replace(tokens, mass=tokens.mass * 2.0**power, windows=windows)
    assert torch.equal(AFFINITIES[name](louder), AFFINITIES[name](tokens))


@pytest.mark.parametrize("name", AFFINITIES)
def test_affinities_look_only_at_what_they_should(name):
    tokens = random_tokens(7, heads=3, count=9)
    before = AFFINITIES[name](tokens)
    changed = {
        "keys": replace(tokens, keys=tokens.keys.flip(2)),
        "values": replace(tokens, values=tokens.values.flip(2)),
        "mass": replace(tokens, mass=tokens.mass.flip(2)),
        32: replace(tokens, windows={**tokens.windows, 32: tokens.windows[32].flip(2)}),
        128: replace(tokens, windows={**tokens.windows, 128: tokens.windows[128].flip(2)}),
        "position": replace(tokens, position=2),
        "seen": replace(tokens, seen=77),
        "queries": replace(tokens, queries=replace(tokens.queries, states=tokens.queries.states.flip(3))),
        "newer": replace(tokens, queries=replace(tokens.queries, keys=tokens.queries.keys.flip(2))),
        "again": replace(tokens, again=replace(tokens.again, states=2 * tokens.again.states)),
        "heads": replace(tokens, heads=(2, 1, 0)),
        "seed": replace(tokens, seed=1),
    }
    read = {
        "cosine": {"keys"},
        "displacement": {"keys", "mass"},
        "mass": {"mass"},
        "idle": {"mass", "position", "seen"},
        "value-attention": {"values", "mass", "position", "seen"},
        "window": {32},
        "long-window": {128},
        "age": set(),
        "keydiff": {"keys"},
        "nested": {"keys"},
        "expected": {"keys", "values", "queries"},
        "decayed": {"keys", "position", "seen", "queries", "newer"},
        "again": {"keys", "values", "again"},
        "random": {"position", "heads", "seed"},
    }
    for part, other in changed.items():
        assert torch.equal(AFFINITIES[name](other), before) == (part not in read[name])
    # Without the queries, which are there only once, mass takes their place.
    assert AFFINITIES[name].mass == bool(read[name] & {"mass", "queries", "again"})
    assert {AFFINITIES[name].window} - {None} == read[name] & {32, 128}
    assert bool(AFFINITIES[name].queries) == ("queries" in read[name])
    assert AFFINITIES[name].again == ("again" in read[name])
    # The length of a key does not matter to the cosine, and every head stands for itself.
    if name == "cosine":
        torch.testing.assert_close(AFFINITIES[name](replace(tokens, keys=tokens.keys * 3)), before)
    assert torch.equal(AFFINITIES[name](tokens.of_heads([2, 0])), before[:, [2, 0]])
    without = replace(tokens, mass=None, windows={}, queries=None, again=None).of_heads([1])
    assert (without.mass, without.windows, without.keys.shape) == (None, {}, (1, 1, 9, 4))
    if read[name] & {"mass", "queries", "again", 32, 128}:
        with pytest.raises(ValueError, match="needs attention received, and none was measured"):
            AFFINITIES[name](without)


def test_no_attention_at_all_gives_no_nan():
    tokens = random_tokens(8, count=6)
    silence = torch.zeros(1, 2, 6)
    silent = replace(tokens, mass=silence, windows=dict.fromkeys(WINDOWS, silence))
    for name in AFFINITIES:
        assert not AFFINITIES[name](silent).isnan().any()


@settings(PROPERTY, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 12),
    position=st.integers(0, 30),
    kept=st.integers(1, 12),
    heads=st.permutations(range(3)),
)
def test_parts_of_the_tokens_keep_what_belongs_to_them(*, seed, tokens, position, kept, heads):
    whole = random_tokens(seed, batch=2, heads=3, count=tokens, position=position)
    parts = {"oldest": whole.oldest(kept), "heads": whole.of_heads(heads[:2])}
    index = {"oldest": (slice(None), slice(None), slice(kept)), "heads": (slice(None), heads[:2])}
    for name, part in parts.items():
        for found, own in (
            (part.keys, whole.keys),
            (part.values, whole.values),
            (part.mass, whole.mass),
            *((part.windows[size], whole.windows[size]) for size in whole.windows),
        ):
            assert torch.equal(found, own[index[name]])
        assert list(part.windows) == list(whole.windows)
        assert (part.position, part.seen) == (whole.position, whole.seen)
    # Being among the oldest does not change what was received on average.
    assert torch.equal(mean_attention(whole.oldest(kept)), mean_attention(whole)[..., :kept])


def test_the_mean_is_over_the_queries_that_could_look():
    # Every query looks alike at all that it can see.
    query, key = torch.zeros(1, 2, 200, 4), torch.randn(1, 2, 200, 4, generator=torch.Generator().manual_seed(1))
    mass = attention_mass(query, key, Softmax(SCALING))
    tokens = replace(random_tokens(0, count=200), keys=key, mass=mass, seen=200)
    expected = [sum(1 / seen for seen in range(token + 1, 201)) / (200 - token) for token in range(200)]
    np.testing.assert_allclose(mean_attention(tokens)[0, 0].numpy(), expected, rtol=1e-4)


def test_pooling_takes_only_neighbours_there_are():
    assert POOL == 5
    received = torch.tensor([6.0, 0, 0, 0, 0, 0, 3])
    assert pooled(received[None, None])[0, 0].tolist() == pytest.approx([2, 1.5, 1.2, 0, 0.6, 0.75, 1])
