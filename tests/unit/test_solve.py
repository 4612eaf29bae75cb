"""The solver: the budget is met exactly on the curves it was given, or refused with the range that can be met."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvprofile.errors import MismatchError, UsageError
from kvprofile.names import GRANULARITIES
from kvprofile.planning.reach import check_budget
from kvprofile.planning.solve import interpolate, solve, thresholds_of
from tests.unit.reference import PROPERTY

MODES = [(rule, granularity) for rule in ("uniform", "common") for granularity in GRANULARITIES]


def _curve_at(thresholds, curve, epsilon):
    """The share at a threshold: straight lines between the measured points."""
    if math.isinf(epsilon):
        return 1.0
    for low in range(len(thresholds) - 1):
        if thresholds[low] <= epsilon <= thresholds[low + 1]:
            part = (epsilon - thresholds[low]) / (thresholds[low + 1] - thresholds[low])
            return curve[low] + part * (curve[low + 1] - curve[low])
    raise AssertionError(f"{epsilon} is not among the thresholds")


@st.composite
def _problems(draw, lowest=0.3):
    """Rising curves that end at 1, level in places, and a budget that every head can meet."""
    layers, heads, points = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 10))
    thresholds = sorted(draw(st.sets(st.integers(-100, 100), min_size=points, max_size=points)))
    curves = np.empty((layers, heads, points))
    for layer in range(layers):
        for head in range(heads):
            floor = draw(st.floats(0, lowest))
            steps = draw(st.lists(st.integers(0, 5), min_size=points - 1, max_size=points - 1))
            climbed = np.concatenate([[0], np.cumsum(steps)]) / max(1, sum(steps))
            climbed[-1] = 1
            curves[layer, head] = floor + (1 - floor) * climbed
    curves[..., -1] = 1
    return np.array(thresholds) / 100, curves, draw(st.floats(lowest, 1))


@settings(PROPERTY, max_examples=150)
@given(problem=_problems(), mode=st.sampled_from(MODES))
def test_the_budget_is_met_by_thresholds_that_reproduce_the_shares(problem, mode):
    thresholds, curves, budget = problem
    rule, granularity = mode
    layers, heads, _ = curves.shape
    solution = solve(thresholds, curves, budget, rule=rule, granularity=granularity)
    assert solution.share.mean() == pytest.approx(budget, abs=1e-9)
    assert solution.share.shape == solution.epsilon.shape == (layers, heads)
    assert ((solution.share >= 0) & (solution.share <= 1)).all()
    for layer in range(layers):
        for head in range(heads):
            share = _curve_at(thresholds, curves[layer, head], solution.epsilon[layer, head])
            assert solution.share[layer, head] == pytest.approx(share, abs=1e-9)
    if rule == "common":
        assert len(np.unique(solution.epsilon)) == 1
    elif granularity == "layer":
        assert all(len(np.unique(row)) == 1 for row in solution.epsilon)
        np.testing.assert_allclose(solution.share.mean(axis=1), budget, atol=1e-9)
    else:
        np.testing.assert_allclose(solution.share, budget, atol=1e-9)


@settings(PROPERTY, max_examples=100)
@given(problem=_problems(), second=st.floats(0.3, 1), mode=st.sampled_from(MODES))
def test_a_larger_budget_takes_no_slot_from_anyone(problem, second, mode):
    thresholds, curves, first = problem
    rule, granularity = mode
    small, large = (
        solve(thresholds, curves, budget, rule=rule, granularity=granularity) for budget in sorted([first, second])
    )
    assert (large.share >= small.share - 1e-12).all()
    assert (large.epsilon >= small.epsilon).all()


@PROPERTY
@given(problem=_problems(), mode=st.sampled_from(MODES))
def test_the_whole_budget_merges_nothing(problem, mode):
    thresholds, curves, _ = problem
    solution = solve(thresholds, curves, 1.0, rule=mode[0], granularity=mode[1])
    assert np.isinf(solution.epsilon).all()
    assert (solution.share == 1).all()


@PROPERTY
@given(problem=_problems(lowest=0.9), mode=st.sampled_from(MODES), below=st.floats(0.01, 0.999))
def test_what_is_out_of_reach_is_told_with_the_range_that_is_not(problem, mode, below):
    thresholds, curves, _ = problem
    rule, granularity = mode
    groups = {"common": curves.mean(axis=(0, 1))[None], "layer": curves.mean(axis=1), "head": curves}
    floor = groups["common" if rule == "common" else granularity][..., 0].max()
    assume(floor > 1e-6)
    with pytest.raises(MismatchError) as caught:
        solve(thresholds, curves, floor * below, rule=rule, granularity=granularity)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    low, high = re.search(r"ask for a budget from (\S+) to (\S+),", message).groups()
    assert float(low) == pytest.approx(floor, abs=0.0011)
    for end in (low, high):
        solution = solve(thresholds, curves, float(end), rule=rule, granularity=granularity)
        assert solution.share.mean() == pytest.approx(float(end), abs=1e-9)


def test_the_reachable_end_can_be_reached_when_it_is_a_round_number():
    # The mean of the two lowest shares is 0.564, which comes out as 0.5640000000000001 in binary.
    curves = np.array([[[0.6087, 1.0], [0.5193, 1.0]]])
    with pytest.raises(MismatchError) as caught:
        solve(np.array([-1.0, 1.001]), curves, 0.5, granularity="layer")
    low = re.search(r"ask for a budget from (\S+) to 1,", str(caught.value)).group(1)
    solution = solve(np.array([-1.0, 1.001]), curves, float(low), granularity="layer")
    assert solution.share.mean() == pytest.approx(float(low))


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, 1.0000001, math.nan, math.inf, -math.inf])
def test_a_budget_that_is_no_fraction_is_refused(budget):
    for refuse in (check_budget, lambda value: solve(np.array([0.0, 1.0]), np.array([[[0.0, 1.0]]]), value)):
        with pytest.raises(
            UsageError, match="is not a fraction of slots to keep; expected above 0 and at most 1"
        ) as caught:
            refuse(budget)
        assert caught.value.exit_code == 2
        assert f"budget {budget:g} " in str(caught.value)


@pytest.mark.parametrize("budget", [1e-9, 0.5, 1])
def test_a_fraction_is_a_budget(budget):
    assert check_budget(budget) == budget


def test_a_level_stretch_is_left_by_its_high_end():
    # Between .2 and .8 no cosine lies: every threshold there gives the same sets.
    solution = solve(np.array([0.0, 0.2, 0.8, 1.0]), np.array([[[0.2, 0.5, 0.5, 1.0]]]), 0.5)
    assert solution.epsilon.item() == 0.8
    assert solution.share.item() == 0.5


def test_a_curve_that_dips_is_read_as_level():
    # Greedy sets can be one more at a lower threshold.
    thresholds = np.array([0.0, 0.3, 0.6, 1.0])
    expected = {0.3: 0.075, 0.55: 0.2625, 0.7: 0.7, 0.8: 0.8}
    for rule, granularity in MODES:
        for budget, epsilon in expected.items():
            dipped = solve(thresholds, np.array([[[0.2, 0.6, 0.5, 1.0]]]), budget, rule=rule, granularity=granularity)
            assert dipped.epsilon.item() == pytest.approx(epsilon)
            assert dipped.share.item() == pytest.approx(budget)


@pytest.mark.parametrize(("layers", "heads"), [(30, 3), (80, 64)])
@pytest.mark.parametrize("mode", MODES)
def test_models_of_real_size(layers, heads, mode):
    generator = np.random.default_rng(0)
    thresholds = np.linspace(-1, 1.001, 64)
    curves = generator.random((layers, heads, 64)).cumsum(-1)
    curves = 0.05 + 0.95 * curves / curves[..., -1:]
    for budget in (0.15, 0.35, 0.5, 0.9):
        solution = solve(thresholds, curves, budget, rule=mode[0], granularity=mode[1])
        assert solution.share.mean() == pytest.approx(budget, abs=1e-9)


@settings(PROPERTY, max_examples=100)
@given(problem=_problems(), data=st.data())
def test_thresholds_are_the_curves_read_backwards(problem, data):
    thresholds, curves, _ = problem
    layers, heads, _ = curves.shape
    shares = np.array([[data.draw(st.floats(curve[0], 1)) for curve in layer] for layer in curves])
    found = thresholds_of(thresholds, curves, shares)
    assert found.shape == (layers, heads)
    for place, epsilon in np.ndenumerate(found):
        assert _curve_at(thresholds, curves[place], epsilon) == pytest.approx(shares[place], abs=1e-9)
        assert np.isinf(epsilon) == (shares[place] == 1)
        # One curve and one share at a time is the same.
        alone = thresholds_of(thresholds, curves[place], float(shares[place]))
        assert alone.shape == ()
        assert alone == epsilon


def test_a_share_below_the_curve_takes_the_lowest_threshold():
    assert thresholds_of(np.array([-1.0, 1.0]), np.array([0.4, 1.0]), 0.1) == -1


def test_many_curves_are_read_as_numpy_reads_one():
    random = np.random.default_rng(0)
    grid = np.sort(random.uniform(0, 1, 6))
    curves = random.normal(size=(7, 3, 6))
    places = random.uniform(-0.2, 1.2, (7, 3))
    places[0], places[1] = grid[:3], grid[3:]
    expected = [
        [np.interp(*parts) for parts in zip(row, [grid] * 3, several, strict=True)]
        for row, several in zip(places, curves, strict=True)
    ]
    np.testing.assert_allclose(interpolate(places, grid, curves), expected, rtol=1e-14)
    assert (interpolate(places, grid[:1], curves[..., :1]) == curves[..., 0]).all()
