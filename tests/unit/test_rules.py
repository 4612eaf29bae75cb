"""The field's budget rules: each against its published formula, counted out token by token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.errors import MismatchError, UsageError
from kvprofile.planning.allocate import STEPS
from kvprofile.planning.rules import PUBLISHED, rule_shares
from kvprofile.planning.rules.cake import cake
from kvprofile.planning.rules.dynamickv import dynamickv, winners
from kvprofile.planning.rules.fit import on_grid, proportional, within
from kvprofile.planning.rules.prefixkv import prefixkv
from kvprofile.planning.rules.pyramidkv import pyramidkv
from kvprofile.planning.rules.squeeze import KEPT, nearest_groups, squeeze

LAYERS = 7


def measured(seed=0, layers=LAYERS):
    """What a calibration records, for a model of `layers` layers that differ a lot."""
    random = np.random.default_rng(seed)
    mass = -np.sort(-random.pareto(random.uniform(0.5, 3, (layers, 1)), (layers, 256)), axis=1)
    return {
        "window_histogram": random.multinomial(3000, random.dirichlet(np.full(64, 0.3), layers)),
        "mass_coverage": np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True),
        "window_entropy": random.uniform(10, 400, layers),
        "window_variance": random.uniform(0.001, 2, layers),
        "attention_cosine": random.uniform(0.3, 0.999, layers),
    }


# What all have in common.


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(PUBLISHED)),
    seed=st.integers(0, 1000),
    layers=st.integers(1, 12),
    budget=st.floats(0.05, 1.0),
    floor=st.floats(0.0, 0.05),
)
def test_every_rule_spends_the_budget_exactly(name, seed, layers, budget, floor):
    shares = rule_shares(name, measured(seed, layers), range(layers), budget, floor=min(floor, budget - 0.005))
    assert shares.shape == (layers,)
    assert shares.mean() == pytest.approx(budget, abs=1e-9)
    assert (shares <= 1 + 1e-9).all()
    assert (shares >= min(floor, budget - 0.005) - 1e-9).all()
    # All but one layer, which takes what is left of a step, lie on the solver's grid.
    off = np.abs(shares * STEPS - np.round(shares * STEPS)) > 1e-6
    assert off.sum() <= 1


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(PUBLISHED)),
    seed=st.integers(0, 1000),
    budgets=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2),
)
def test_more_budget_takes_no_slots_from_a_layer(name, seed, budgets):
    low, high = (rule_shares(name, measured(seed), range(LAYERS), budget, floor=0.03) for budget in sorted(budgets))
    # A step either way is rounding. DynamicKV ranks anew at every budget, so there a layer may well lose.
    if name != "dynamickv":
        assert (high >= low - 1 / STEPS - 1e-9).all()
    assert high.sum() >= low.sum() - 1e-9


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ends_of_the_range(name):
    assert (rule_shares(name, measured(), range(LAYERS), 1.0, floor=0.03) == 1).all()
    floor = 8 / STEPS
    assert rule_shares(name, measured(), range(LAYERS), floor, floor=floor) == pytest.approx(floor)
    with pytest.raises(MismatchError, match=r"budget 0\.02 is out of reach.* at least 0\.031 .* from 0\.032 to 1"):
        rule_shares(name, measured(), range(LAYERS), 0.02, floor=floor)


@pytest.mark.parametrize("name", [name for name, rule in PUBLISHED.items() if rule.needs != ("depth",)])
def test_what_was_not_measured_is_told(name):
    first = PUBLISHED[name].needs[0]
    arrays = {key: array for key, array in measured().items() if key != first}
    with pytest.raises(UsageError, match=rf"what the rule {name} goes by \({first}\).*calibrate anew"):
        rule_shares(name, arrays, range(LAYERS), 0.5, floor=0.0)


def test_a_layer_that_did_not_show_its_hidden_state_counts_only_where_it_is_merged():
    arrays = measured()
    arrays["attention_cosine"][2] = np.nan
    with pytest.raises(UsageError, match="attention_cosine"):
        rule_shares("squeeze", arrays, range(LAYERS), 0.5, floor=0.0)
    rest = [0, 1, 3, 4]
    expected = squeeze(arrays["attention_cosine"][rest], budget=0.5, floor=0.0)
    assert rule_shares("squeeze", arrays, rest, 0.5, floor=0.0) == pytest.approx(expected, abs=1 / STEPS)


# PyramidKV.


def test_pyramidkv_is_the_published_line():
    # 32 layers, 1,000 tokens, 100 of them kept beyond a window of 20: 100 // 20 = 5 in the last layer, 195 in the first.
    shares = pyramidkv(np.linspace(0, 1, 32), budget=0.12, floor=0.02) * 1000
    assert shares[-1] == pytest.approx(20 + 5)
    assert shares[0] == pytest.approx(20 + 195)
    assert np.diff(shares) == pytest.approx(np.full(31, -190 / 31))
    assert shares.mean() == pytest.approx(120)


def test_pyramidkv_stops_at_all_tokens():
    # Of 1,000 tokens 20 always stay and 700 more are kept: twice that less 35 is more than there are.
    shares = pyramidkv(np.linspace(0, 1, 5), budget=0.72, floor=0.02) * 1000
    assert shares[0] == pytest.approx(1000)
    assert shares[-1] == pytest.approx(20 + 2 * 700 - 980)


# CAKE.


def test_cake_is_proportional_to_entropy_times_variance():
    entropy, variance = np.array([30.0, 10.0, 20.0]), np.array([0.2, 0.4, 0.1])
    shares = cake(entropy, variance, budget=0.2, floor=0.05)
    assert shares == pytest.approx(0.05 + 0.45 * np.array([6, 4, 2]) / 12)


def test_what_a_full_layer_cannot_take_goes_to_the_others_in_proportion():
    shares = proportional(np.array([8.0, 2.0, 1.0, 1.0]), 0.5, floor=0.1)
    # 1.6 above the floor: 8/12 of it exceed the 0.9 that fit; the other 0.7 go 2 : 1 : 1.
    assert shares == pytest.approx([1.0, 0.45, 0.275, 0.275])
    # Layers that ask for nothing take what nobody else can.
    assert proportional(np.array([1.0, 0.0]), 0.75, floor=0.0) == pytest.approx([1.0, 0.5])
    assert proportional(np.zeros(4), 0.3, floor=0.1) == pytest.approx([0.3] * 4)


# PrefixKV.


def test_prefixkv_keeps_the_tokens_that_hold_one_part_of_the_mass():
    # Mass of 8 tokens in three layers, heaviest first; each layer keeps the fewest that hold p.
    mass = np.array(
        [[40, 30, 10, 5, 5, 5, 3, 2], [20, 20, 15, 15, 10, 10, 5, 5], [96, 1, 1, 1, 0.25, 0.25, 0.25, 0.25]]
    )
    coverage = np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True)

    def published(kept):
        """Raise p a little at a time until the layers' counts reach the total."""
        for part in np.arange(0, 1, 1e-4):
            counts = [next(n for n in range(9) if np.append(0, row)[n] >= part - 1e-12) for row in coverage]
            if sum(counts) >= kept:
                return np.array(counts)
        raise AssertionError

    for kept in (3, 6, 11, 15):
        counts = published(kept)
        shares = prefixkv(coverage, budget=counts.sum() / 24, floor=0.0) * 8
        # Parts of a token are kept where the published rule takes whole ones.
        assert np.abs(shares - counts).max() <= 1.0
        assert shares.sum() == pytest.approx(counts.sum())
        parts = [np.interp(share, range(9), np.append(0, row)) for share, row in zip(shares, coverage, strict=True)]
        assert parts == pytest.approx([parts[0]] * 3, abs=1e-9)


def test_prefixkv_with_tokens_that_no_query_looks_at():
    coverage = np.array([[0.9, 1.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]])
    assert prefixkv(coverage, budget=0.75, floor=0.0) == pytest.approx([0.5, 1.0])
    assert prefixkv(coverage, budget=0.875, floor=0.0) == pytest.approx([0.75, 1.0])
    assert prefixkv(coverage, budget=0.4, floor=0.3)[0] == pytest.approx(0.3)


# SqueezeAttention.


def brute_force_groups(values):
    """The best of all 3^n ways to put n values into three groups."""
    best, least = None, math.inf
    for code in range(3 ** len(values)):
        labels = np.array([code // 3**place % 3 for place in range(len(values))])
        cost = sum(((values[labels == group] - values[labels == group].mean()) ** 2).sum() for group in set(labels))
        if cost < least - 1e-12 and len(set(labels)) == 3:
            best, least = labels, cost
    order = sorted(set(best), key=lambda group: values[best == group].mean())
    return np.array([order.index(label) for label in best])


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_best_there_are(seed):
    values = np.random.default_rng(seed).uniform(0.5, 1, 6)
    assert nearest_groups(values).tolist() == brute_force_groups(values).tolist()


def test_squeeze_cuts_the_group_that_changes_least():
    cosine = np.array([0.41, 0.85, 0.99, 0.84, 0.4, 0.98])
    shares = squeeze(cosine, budget=0.21, floor=0.01)
    others = (6 * 0.21 - 2 * 0.08) / 4
    cut = KEPT * 0.21
    assert cut == pytest.approx(0.08)
    assert shares == pytest.approx([others, others, 0.08, others, others, 0.08])
    # Where the others would get more than all their tokens, the cut group keeps the rest.
    assert squeeze(np.array([0.1, 0.5, 0.9, 0.91]), budget=0.8, floor=0.0) == pytest.approx([1, 1, 0.6, 0.6])


def test_squeeze_with_few_layers():
    assert squeeze(np.array([0.7, 0.7, 0.7]), budget=0.4, floor=0.0) == pytest.approx([0.4] * 3)
    assert squeeze(np.array([0.7]), budget=0.4, floor=0.0) == pytest.approx([0.4])
    assert squeeze(np.array([0.9, 0.2]), budget=0.42, floor=0.0) == pytest.approx([0.16, 0.68])


# DynamicKV.


def published_counts(scores, base, layers_total):
    """DynamicKV's counts for `scores` `(layers, n)`, ranked one by one; `base` per layer."""
    n = scores.shape[1]
    kept = np.full(len(scores), min(10 * base, n), dtype=float)
    for seen in [*range(4, layers_total, 4), layers_total]:
        flat = [(score, layer) for layer in range(seen) for score in scores[layer]]
        best = sorted(flat, reverse=True)[: base * seen]
        counts = np.bincount([layer for _, layer in best], minlength=seen)
        kept[:seen] = np.minimum(kept[:seen], counts / counts.sum() * base * layers_total)
    return kept


@pytest.mark.parametrize(("base", "layers"), [(3, 3), (5, 8), (2, 10), (12, 6)])
def test_dynamickv_counts_the_winners_of_all_layers(base, layers):
    random = np.random.default_rng(base)
    scores = random.permutation(layers * 40).reshape(layers, 40)
    scores = np.argsort(np.argsort((scores * random.uniform(0.2, 1, (layers, 1))).ravel())).reshape(layers, 40)
    histogram = np.zeros((layers, layers * 40))
    np.put_along_axis(histogram, scores, 1, axis=1)
    counts = published_counts(scores, base, layers)
    if counts.sum() == pytest.approx(base * layers):  # nothing was cut, so nothing has to be scaled up again
        assert dynamickv(histogram, budget=base / 40, floor=0.0) * 40 == pytest.approx(counts, abs=1e-6)
    else:
        expected = proportional(counts / 40, base / 40, floor=0.0, cap=min(1, base / 4))
        assert dynamickv(histogram, budget=base / 40, floor=0.0) == pytest.approx(expected, abs=1e-6)
    best = winners(histogram, base / 40) * 40
    flat = np.sort(scores.ravel())[-base * layers :]
    assert best == pytest.approx([np.isin(row, flat).sum() for row in scores], abs=1e-6)


def test_dynamickv_gives_one_layer_ten_budgets_at_most():
    histogram = np.zeros((20, 8))
    histogram[:, 0] = 100
    histogram[3] = [0] * 7 + [100]
    shares = dynamickv(histogram, budget=0.05, floor=0.01)
    assert shares[3] == pytest.approx(0.01 + 10 * 0.04)
    assert shares.mean() == pytest.approx(0.05)


# Fitting.


def test_what_is_missing_goes_where_there_is_room():
    assert within(np.array([0.2, 1.4, 0.8]), 0.8, floor=0.1) == pytest.approx([0.52, 1.0, 0.88])
    assert within(np.array([0.0, 0.4, 0.8]), 0.35, floor=0.1) == pytest.approx([0.1, 0.325, 0.625])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_grid_moves_no_layer_by_more_than_a_step(shares):
    shares = np.array(shares)
    found = on_grid(shares, shares.mean())
    assert found.mean() == pytest.approx(shares.mean(), abs=1e-9)
    assert np.abs(found - shares).max() <= 1 / STEPS + 1e-9
    assert (found <= 1 + 1e-9).all()
