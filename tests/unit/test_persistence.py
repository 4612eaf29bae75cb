"""Persistence against the per-sample ratios it summarises."""

import numpy as np
import pytest
import torch

from kvprofile.calibration.measure.moments import Moments
from kvprofile.calibration.measure.persistence import LEVELS, persistence
from kvprofile.calibration.measure.ratios import THRESHOLDS, CompressionRatios, count_sets
from kvprofile.merging.sets import SET_RULES

HEADS = 3


def _samples(seed, layers, counts):
    """Made-up ratios of every sample: `{kind: (samples, layers, rules, HEADS, thresholds)}`, rising in the threshold."""
    generator = np.random.default_rng(seed)
    samples = {}
    for kind, count in counts.items():
        noise = generator.random((count, layers, len(SET_RULES), HEADS, len(THRESHOLDS))).cumsum(-1)
        noise += generator.random((layers, 1, HEADS, 1)) * 3
        samples[kind] = noise / noise[..., -1:]
    return samples


def _ratios(samples, layers):
    ratios = CompressionRatios(layers, HEADS)
    for kind, values in samples.items():
        ratios.kinds[kind] = Moments(layers, ratios.shape)
        for sample in values:
            for layer, ratio in enumerate(sample):
                ratios.kinds[kind].update(layer, np.concatenate([ratio, ratio.mean(axis=1, keepdims=True)], axis=1))
    return ratios


def _ranks(values):
    return [sum(other < value for other in values) for value in values]


def _rms(deviations):
    return np.sqrt(np.mean(np.square(deviations)))


def _direct(kinds):
    """`kinds` is `{kind: (samples, layers, HEADS)}` at one threshold."""
    by_layer = {kind: values.mean(axis=2) for kind, values in kinds.items()}

    def within(parts):
        total = sum(((values - values.mean(axis=0)) ** 2).sum(axis=0) for values in parts.values())
        return np.sqrt(total / sum(len(values) - 1 for values in parts.values()))

    def between(parts):
        means = [values.mean(axis=0) for values in parts.values()]
        return _rms(np.std(means, axis=0, ddof=1)) if len(means) > 1 else None

    everything = np.concatenate(list(kinds.values()))
    order = [_ranks(values.mean(axis=0)) for _, values in sorted(by_layer.items())]
    pairs = [np.corrcoef(first, order[b])[0, 1] for a, first in enumerate(order) for b in range(a + 1, len(order))]
    return {
        "ratio": everything.mean(),
        "between_samples": _rms(within(by_layer)),
        "between_kinds": between(by_layer),
        "between_layers": everything.mean(axis=(0, 2)).std(ddof=1),
        "head_between_samples": _rms(within(kinds)),
        "head_between_kinds": between(kinds),
        "between_heads": everything.mean(axis=0).std(ddof=1),
        "rank_correlation": min(pairs) if pairs else None,
    }


@pytest.mark.parametrize("rule", SET_RULES)
@pytest.mark.parametrize("counts", [{"essay": 3, "table": 2, "code": 4}, {"essay": 5, "table": 1}, {"essay": 4}])
def test_rows_are_the_per_sample_arrays(rule, counts):
    layers = 5
    samples = _samples(7, layers, counts)
    rows = persistence(_ratios(samples, layers), rule)
    at_rule = SET_RULES.index(rule)
    overall = np.concatenate(list(samples.values()))[:, :, at_rule].mean(axis=(0, 1, 2))
    assert len(rows) == len(LEVELS)
    for row, level in zip(rows, LEVELS, strict=True):
        at = min(range(len(THRESHOLDS)), key=lambda index: abs(overall[index] - level))
        assert row.threshold == THRESHOLDS[at]
        expected = _direct({kind: values[:, :, at_rule, :, at] for kind, values in samples.items()})
        for name, value in expected.items():
            found = getattr(row, name)
            assert found is None if value is None else found == pytest.approx(value, abs=1.1e-6), name


def test_levels_that_protected_tokens_keep_out_of_reach_are_left_out():
    samples = _samples(8, 4, {"essay": 3})
    high = {kind: 0.55 + 0.45 * values for kind, values in samples.items()}
    rows = persistence(_ratios(high, 4), "chain")
    assert len(rows) == 2
    assert rows[0].ratio == pytest.approx(0.75, abs=0.1)
    assert 0.55 < rows[1].ratio < 0.6


def test_it_reads_what_calibration_measures():
    ratios = CompressionRatios(4, HEADS, ("chain",))
    seen = {"essay": [], "table": []}
    for seed, kind in enumerate(["essay", "table", "essay", "table"]):
        rows = []
        for layer in range(4):
            generator = torch.Generator().manual_seed(10 * seed + layer)
            keys = torch.randn(HEADS, 50, 3, generator=generator).cumsum(1) * 0.2 * (layer + 1)
            protected = torch.zeros(HEADS, 50, dtype=torch.bool)
            ratios.update(layer, kind, keys, protected, apart=0)
            rows.append(count_sets(keys, protected, "chain") / 50)
        seen[kind].append(rows)
    rows = persistence(ratios, "chain")
    assert rows
    for row in rows:
        at = int(np.flatnonzero(row.threshold == THRESHOLDS)[0])
        for name, value in _direct({kind: np.array(values)[..., at] for kind, values in seen.items()}).items():
            assert getattr(row, name) == pytest.approx(value, abs=1.1e-6), name


def test_equal_samples_do_not_vary():
    one = _samples(9, 4, {"essay": 1})["essay"]
    rows = persistence(_ratios({"essay": np.repeat(one, 3, axis=0), "table": np.repeat(one, 2, axis=0)}, 4), "anchor")
    assert len(rows) == 3
    for row in rows:
        assert (row.between_samples, row.between_kinds, row.head_between_samples, row.head_between_kinds) == (
            0,
            0,
            0,
            0,
        )
        assert row.rank_correlation == 1
        assert row.between_layers > 0


def test_one_sample_of_one_layer_has_no_spread_to_speak_of():
    (row, *_) = persistence(_ratios(_samples(10, 1, {"essay": 1}), 1), "chain")
    assert (row.between_samples, row.between_layers, row.between_kinds, row.rank_correlation) == (0, 0, None, None)
    assert row.between_heads > 0


def test_layers_that_cannot_be_ranked_have_no_rank_correlation():
    # Every layer the same ratio: there is no order to agree on, and no number may stand for it.
    one = _samples(11, 1, {"essay": 2, "table": 2})
    same = {kind: np.repeat(values, 4, axis=1) for kind, values in one.items()}
    rows = persistence(_ratios(same, 4), "chain")
    assert rows
    assert {row.rank_correlation for row in rows} == {None}
    assert {row.between_layers for row in rows} == {0}


def test_layers_that_were_never_seen_do_not_count():
    # Layers without a full-attention cache are not observed: a hybrid model's first layer, say.
    samples = _samples(12, 5, {"essay": 3, "table": 3})
    partial = CompressionRatios(6, HEADS)
    for kind, values in samples.items():
        partial.kinds[kind] = Moments(6, partial.shape)
        for sample in values:
            for layer, ratio in enumerate(sample):
                row = np.concatenate([ratio, ratio.mean(axis=1, keepdims=True)], axis=1)
                partial.kinds[kind].update(layer + 1, row)
    assert persistence(partial, "chain") == persistence(_ratios(samples, 5), "chain")
