"""Accumulators: each against a direct computation over all that it saw, and any split over workers against one run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.calibration.measure.adjacent import BINS, AdjacentSimilarity
from kvprofile.calibration.measure.distance import SimilarityByDistance
from kvprofile.calibration.measure.maps import CELLS, SimilarityMap
from kvprofile.calibration.measure.moments import Moments
from kvprofile.calibration.measure.ratios import THRESHOLDS, CompressionRatios, count_sets
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.merging.combine import Combination
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.protect import Protection
from kvprofile.merging.scores import MASS_STRIDE
from kvprofile.merging.sets import SET_RULES
from kvprofile.runtime.attention import AttentionCall
from tests.unit.reference import PROPERTY, attention_weights, mass_of, scan_sets

LAYERS, HEADS = 2, 2
KINDS = ("essay", "table")


def _keys(seed, tokens, step=0.4):
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(HEADS, tokens, 6, generator=generator).cumsum(1) * step
    return walk + torch.randn(HEADS, 1, 6, generator=generator)


def _gram(keys):
    """Cosines of all pairs, `(heads, tokens, tokens)`, in float64."""
    keys = keys.double().numpy()
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    return unit @ unit.transpose(0, 2, 1)


# Adjacent similarity.


def _fan(centres):
    """Keys in the plane whose neighbours have exactly these cosines, well inside the histogram's bins."""
    angles = np.concatenate([[0.3], 0.3 + np.arccos(centres).cumsum()])
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=-1) * 3)


def test_histograms_are_numpys():
    generator = np.random.default_rng(0)
    cosines = [(generator.integers(8, BINS - 8, (HEADS, 80)) + 0.5) / (BINS / 2) - 1 for _ in range(4)]
    accumulator = AdjacentSimilarity(LAYERS, HEADS)
    for sample in (0, 2):
        keys, values = (torch.stack([_fan(head) for head in cosines[sample + part]]) for part in (0, 1))
        accumulator.update(1, keys, values)
    found = accumulator.finish()
    for name, part in (("key_histogram", 0), ("value_histogram", 1)):
        assert found[name].shape == (LAYERS, HEADS, BINS)
        assert not found[name][0].any()
        for head in range(HEADS):
            seen = np.concatenate([cosines[part][head], cosines[part + 2][head]])
            assert (found[name][1, head] == np.histogram(seen, BINS, range=(-1, 1))[0]).all()


def test_the_ends_of_the_histogram_hold_equal_and_opposite_keys():
    accumulator = AdjacentSimilarity(1, HEADS)
    keys = torch.tensor([[[0.1, 0.2], [0.1, 0.2], [0.3, 0.6], [-0.7, -1.4]]]).expand(HEADS, 4, 2)
    accumulator.update(0, keys, torch.zeros(HEADS, 4, 2))
    for head in range(HEADS):
        assert {bin_: int(n) for bin_, n in enumerate(accumulator.keys[0, head]) if n} == {0: 1, BINS - 1: 2}
        assert {bin_: int(n) for bin_, n in enumerate(accumulator.values[0, head]) if n} == {BINS // 2: 3}


def test_the_histogram_answers_the_number_of_chain_sets():
    accumulator = AdjacentSimilarity(1, HEADS)
    keys = _keys(1, 300)
    accumulator.update(0, keys, keys)
    for at in (BINS // 2, BINS * 3 // 4, BINS * 7 // 8):
        epsilon = 2 * at / BINS - 1
        for head, gram in enumerate(_gram(keys)):
            sets = len(scan_sets(gram, epsilon, "chain", [False] * 300))
            assert 300 - accumulator.keys[0, head, at:].sum() == sets


# Similarity by distance.


@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 17, 1), (2, 40, 3)])
def test_similarity_by_distance_is_the_mean_of_the_diagonals(lengths):
    accumulator = SimilarityByDistance(LAYERS, HEADS, 40)
    samples = [_keys(seed, tokens) for seed, tokens in enumerate(lengths)]
    for keys in samples:
        accumulator.update(1, keys)
    arrays = accumulator.finish()
    assert arrays["distances"].tolist() == list(range(1, 40))
    found = arrays["similarity_by_distance"]
    assert found.shape == (LAYERS, HEADS, 39)
    assert not found[0].any()
    for head in range(HEADS):
        for distance in range(1, 40):
            pairs = [np.diagonal(_gram(keys)[head], -distance) for keys in samples]
            expected = np.concatenate(pairs).mean() if sum(map(len, pairs)) else 0.0
            assert found[1, head, distance - 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens", [64, 65, 66, 300, 2048])
def test_long_distances_are_thinned_out_and_keep_their_own_similarity(tokens):
    accumulator = SimilarityByDistance(1, HEADS, tokens)
    keys = _keys(7, tokens)
    accumulator.update(0, keys)
    arrays = accumulator.finish()
    distances, found = arrays["distances"], arrays["similarity_by_distance"]
    near = min(64, tokens - 1)
    assert distances[:near].tolist() == list(range(1, near + 1))
    assert (np.diff(distances) > 0).all()
    assert distances[-1] == tokens - 1
    assert found.shape == (1, HEADS, len(distances))
    # About 32 to every doubling: steps of at most 2.2%, give or take the rounding.
    assert (np.diff(distances[near:]) <= 0.022 * distances[near:-1] + 1).all()
    assert len(distances) <= 64 + 1 + 32 * max(0, np.log2(tokens / 64))
    gram = _gram(keys)
    for place in (0, near - 1, len(distances) // 2, -2, -1):
        for head in range(HEADS):
            expected = np.diagonal(gram[head], -int(distances[place])).mean()
            assert found[0, head, place] == pytest.approx(expected, abs=5e-4)  # single precision, few pairs


# Similarity maps.


@pytest.mark.parametrize("tokens", [CELLS, 2 * CELLS - 1, 2 * CELLS, 3 * CELLS + 7])
def test_similarity_map_is_the_pooled_matrix(tokens):
    accumulator = SimilarityMap(LAYERS, HEADS)
    samples = [_keys(seed, tokens) for seed in (3, 4)]
    for keys in samples:
        accumulator.update(0, keys)
    found = accumulator.finish()["similarity_map"]
    assert found.shape == (LAYERS, HEADS, CELLS, CELLS)
    assert found.dtype == np.float16
    size = tokens // CELLS
    gram = np.mean([_gram(keys) for keys in samples], axis=0)
    for head in range(HEADS):
        for row in range(CELLS):
            for column in range(CELLS):
                block = gram[head, row * size : (row + 1) * size, column * size : (column + 1) * size]
                # On the diagonal without a token's similarity with itself.
                counted = ~np.eye(size, dtype=bool) if row == column and size > 1 else np.ones((size, size), dtype=bool)
                expected = block[counted].mean()
                assert found[0, head, row, column] == pytest.approx(expected, abs=1e-3)


# Moments.


@settings(PROPERTY, max_examples=80)
@given(data=st.data(), seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 1e6]))
def test_moments_are_numpys(data, seed, offset):
    values = np.random.default_rng(seed).normal(offset, 1, (data.draw(st.integers(0, 8)), 2, 3, 2))
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    workers = [Moments(2, (3, 2)) for _ in range(3)]
    for value, worker in zip(values, owner, strict=True):
        for layer in (0, 1):
            workers[worker].update(layer, value[layer])
    # Layer 0 is seen once more by one worker: layers count for themselves.
    workers[2].update(0, np.full((3, 2), offset))
    first, *others = (workers[place] for place in data.draw(st.permutations(range(3))))
    for other in others:
        first.merge(other)
    assert first.count.tolist() == [len(values) + 1, len(values)]
    for layer, seen in enumerate([np.concatenate([values[:, 0], np.full((1, 3, 2), offset)]), values[:, 1]]):
        if len(seen):
            np.testing.assert_allclose(first.mean[layer], seen.mean(axis=0), rtol=1e-12, atol=1e-12)
        expected = seen.std(axis=0, ddof=1) if len(seen) > 1 else np.zeros((3, 2))
        np.testing.assert_allclose(first.std()[layer], expected, rtol=1e-6, atol=1e-9)


def test_merging_one_sample_at_a_time_is_updating_to_the_bit():
    values = np.random.default_rng(3).lognormal(0, 9, (40, 2, 3, 2))
    updated, merged = Moments(2, (3, 2)), Moments(2, (3, 2))
    for index, value in enumerate(values):
        alone = Moments(2, (3, 2))
        for layer in (0, 1) if index % 3 else (1,):
            updated.update(layer, value[layer])
            alone.update(layer, value[layer])
        merged.merge(alone)
    for name, array in updated.state().items():
        assert array.tobytes() == merged.state()[name].tobytes(), name


# Compression ratios.


def test_ratios_are_the_scans_and_protected_tokens_count():
    generator = np.random.default_rng(6)
    accumulator = CompressionRatios(LAYERS, HEADS)
    seen = {kind: [] for kind in KINDS}
    apart, at = 5, [12, 30, 44, 52]
    for seed, kind in enumerate([KINDS[0], KINDS[1], KINDS[0]]):
        tokens = 30 + 5 * seed
        keys = _keys(seed + 20, tokens)
        protected = generator.random((HEADS, tokens)) < 0.1
        accumulator.update(1, kind, keys, torch.tensor(protected), apart)
        ratio = np.zeros((len(SET_RULES), HEADS, len(at)))
        for head, gram in enumerate(_gram(keys)):
            for rule_at, rule in enumerate(SET_RULES):
                for place, index in enumerate(at):
                    sets = scan_sets(gram, THRESHOLDS[index], rule, protected[head])
                    ratio[rule_at, head, place] = (len(sets) + apart) / (tokens + apart)
        seen[kind].append(ratio)
    for kind in KINDS:
        moments = accumulator.kinds[kind]
        expected = np.mean(seen[kind], axis=0)
        assert moments.count.tolist() == [0, len(seen[kind])]
        np.testing.assert_allclose(moments.mean[1][:, :-1, at], expected, rtol=1e-12)
        np.testing.assert_allclose(moments.mean[1][:, -1, at], expected.mean(axis=1), rtol=1e-12)
        assert (moments.mean[1][..., -1] == 1).all()
    together = np.stack(seen[KINDS[0]] + seen[KINDS[1]])
    found = accumulator.finish()
    for rule_at, rule in enumerate(SET_RULES):
        mean, std = found[f"ratio_mean.{rule}"], found[f"ratio_std.{rule}"]
        assert mean.shape == std.shape == (LAYERS, HEADS, len(THRESHOLDS))
        np.testing.assert_allclose(mean[1][:, at], together[:, rule_at].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(std[1][:, at], together[:, rule_at].std(axis=0, ddof=1), rtol=1e-5, atol=1e-7)


def test_thresholds_reach_from_everything_to_nothing():
    assert (np.diff(THRESHOLDS) > 0).all()
    keys = _keys(9, 40)
    free = torch.zeros(HEADS, 40, dtype=torch.bool)
    chain = count_sets(keys, free, "chain")
    assert chain[:, 0].tolist() == [1, 1]
    for rule in SET_RULES:
        assert count_sets(keys, free, rule)[:, -1].tolist() == [40, 40]


@pytest.mark.parametrize("rule", SET_RULES)
def test_a_text_of_recent_tokens_alone_has_nothing_to_merge(rule):
    accumulator = CompressionRatios(1, HEADS, (rule,))
    accumulator.update(0, "essay", torch.zeros(HEADS, 0, 6), torch.zeros(HEADS, 0, dtype=torch.bool), apart=12)
    assert (accumulator.finish()[f"ratio_mean.{rule}"] == 1).all()


# Measurements: all of them, as calibration calls them.


def _call(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS * 2, tokens, 6, generator=generator)
    value = torch.randn(1, HEADS, tokens, 3, generator=generator)
    return AttentionCall(torch.nn.Identity(), query, _keys(seed, tokens)[None], value, None, {"softcap": 20.0})


def test_statistics_see_what_each_measure_sees():
    policy = POLICIES["kvmerger"]
    statistics = Measurements(LAYERS, HEADS, 90, policy)
    calls = [_call(seed, 90) for seed in (31, 32)]
    ratios = []
    at = int(np.abs(THRESHOLDS - 0.8).argmin())
    for call in calls:
        statistics.update(1, "essay", call)
        recent, heavy = 16, 11  # 17% and 12% of 90, rounded up
        weights = attention_weights(call.query[0], call.key[0], 6**-0.5, 20.0)
        mass = mass_of(weights, HEADS, range(89, -1, -MASS_STRIDE))[:, : 90 - recent]
        gram = _gram(call.key[0])
        for head in range(HEADS):
            heaviest = mass[head].argsort()[-heavy:]
            protected = [token in heaviest for token in range(90 - recent)]
            sets = scan_sets(gram[head, : 90 - recent, : 90 - recent], THRESHOLDS[at], "anchor", protected)
            ratios.append((len(sets) + recent) / 90)
    found = statistics.finish()
    np.testing.assert_allclose(
        found["ratio_mean.anchor"][1, :, at], np.reshape(ratios, (2, HEADS)).mean(axis=0), rtol=1e-6
    )
    single = {
        "key_histogram": AdjacentSimilarity(LAYERS, HEADS),
        "similarity_by_distance": SimilarityByDistance(LAYERS, HEADS, 90),
        "similarity_map": SimilarityMap(LAYERS, HEADS),
    }
    for call in calls:
        single["key_histogram"].update(1, call.key[0], call.value[0])
        single["similarity_by_distance"].update(1, call.key[0])
        single["similarity_map"].update(1, call.key[0])
    for name, accumulator in single.items():
        assert (found[name] == accumulator.finish()[name]).all()
        assert found[name][1].any()
    assert sorted(found) == sorted(
        [
            *single,
            "distances",
            "value_histogram",
            *(f"ratio_{part}.{rule}" for part in ("mean", "std") for rule in SET_RULES),
        ]
    )


def test_statistics_without_rules_measure_similarity_only():
    statistics = Measurements(LAYERS, HEADS, 70, POLICIES["gauss"], rules=())
    statistics.update(0, "essay", _call(1, 70))
    assert sorted(statistics.finish()) == [
        "distances",
        "key_histogram",
        "similarity_by_distance",
        "similarity_map",
        "value_histogram",
    ]


_POLICY = Policy(protection=Protection(first=2, recent=8, heavy_share=0.05), combination=Combination())
_SAMPLES = [(KINDS[seed % 2], [_call(100 + 10 * seed + layer, 70) for layer in range(LAYERS)]) for seed in range(5)]


@pytest.fixture(name="one_run", scope="module")
def _one_run():
    return _run(range(len(_SAMPLES)))


def _run(samples):
    statistics = Measurements(LAYERS, HEADS, 70, _POLICY)
    for sample in samples:
        kind, calls = _SAMPLES[sample]
        for layer, call in enumerate(calls):
            statistics.update(layer, kind, call)
    return statistics


@settings(PROPERTY, max_examples=15)
@given(
    order=st.permutations(range(len(_SAMPLES))),
    cuts=st.lists(st.integers(0, len(_SAMPLES)), min_size=2, max_size=2).map(sorted),
    merged=st.permutations(range(3)),
)
def test_workers_add_up_to_one_run_whatever_the_split_and_the_order(one_run, order, cuts, merged):
    parts = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    first, *others = (_run(parts[place]) for place in merged)
    for other in others:
        first.merge(other)
    found_arrays = first.finish()
    for name, array in one_run.finish().items():
        found = found_arrays[name]
        assert found.dtype == array.dtype
        if array.dtype == np.int64:
            assert (found == array).all()
        else:
            np.testing.assert_allclose(found, array, rtol=1e-3 if array.dtype == np.float16 else 1e-6, atol=1e-7)
    assert sorted(first.ratios.kinds) == list(KINDS)
    for kind in KINDS:
        np.testing.assert_allclose(first.ratios.kinds[kind].std(), one_run.ratios.kinds[kind].std(), atol=1e-12)
