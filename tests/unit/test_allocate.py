"""Allocation: the budget is spent to the last slot, and no better way to spend it is left than the bound says."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.calibration.measure.damage import BUDGETS
from kvprofile.errors import MismatchError, UsageError
from kvprofile.planning import allocate as module
from kvprofile.planning.allocate import allocate
from tests.unit.reference import PROPERTY

COARSE = 8


@pytest.fixture(name="coarse")
def _coarse(monkeypatch):
    monkeypatch.setattr(module, "STEPS", COARSE)


def falling_curves(seed, heads, policies, points, *, orders=3.0):
    """Damage that falls over about `orders` orders of magnitude, unevenly, with a rise now and then."""
    generator = np.random.default_rng(seed)
    logs = np.sort(generator.uniform(-orders, 0, (heads, policies, points)))[..., ::-1]
    noise = generator.normal(0, 0.05, logs.shape) * (generator.random(logs.shape) < 0.3)
    return 10.0 ** (logs + noise) * 10 ** generator.uniform(-2, 1, (heads, 1, 1))


def damage_at(budgets, curve, share):
    """A measured curve at any share: logarithms between budgets, straight from the last to 0 at 1; never rising."""
    curve = [min(curve[: place + 1]) for place in range(len(curve))]
    if share <= budgets[0]:
        return curve[0]
    if share >= budgets[-1]:
        return curve[-1] * (1 - share) / (1 - budgets[-1])
    above = next(place for place, budget in enumerate(budgets) if budget > share)
    part = (share - budgets[above - 1]) / (budgets[above] - budgets[above - 1])
    return curve[above - 1] ** (1 - part) * curve[above] ** part


def least_damage(budgets, curves, share, floor):
    """The best policy's damage among those whose protected tokens fit."""
    return min(
        damage_at(budgets, curve, share) for curve, low in zip(curves, floor, strict=True) if low <= share + 1e-9
    )


def grid_of(floor, cap=1.0, steps=COARSE):
    return [min(floor), *(step / steps for step in range(1, steps + 1) if min(floor) < step / steps < cap), cap]


@st.composite
def problems(draw, least=1, most=6):
    count, policies, points = draw(st.integers(least, most)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    budgets = np.array(sorted(draw(st.sets(st.integers(1, 19), min_size=points, max_size=points)))) / 20
    floor = np.array(draw(st.lists(st.floats(0, 0.3), min_size=policies, max_size=policies)))
    cap = draw(st.sampled_from([1.0, 1.0, 0.95, 0.6]))
    damage = falling_curves(
        draw(st.integers(0, 2**31)), count, policies, points, orders=draw(st.sampled_from([1, 3, 9]))
    )
    return budgets, damage, floor, cap, draw(st.floats(min(floor), cap).filter(lambda budget: budget > 0))


@settings(PROPERTY, max_examples=200)
@given(problem=problems())
def test_the_budget_is_spent_to_the_last_slot_within_floor_and_cap(problem):
    budgets, damage, floor, cap, budget = problem
    found = allocate(budgets, damage, budget, floor=floor, cap=cap)
    heads = len(damage)
    assert found.share.shape == found.choice.shape == found.damage.shape == (heads,)
    assert found.share.mean() == pytest.approx(budget, abs=1e-9)
    assert (found.share >= floor.min() - 1e-9).all()
    assert (found.share <= cap + 1e-9).all()
    # A policy gets at least what its protected tokens take.
    assert (found.share >= floor[found.choice] - 1e-8).all()
    for head in range(heads):
        # What is predicted is no less than the chosen policy does at the share, and no more than a grid step before.
        share, curve = found.share[head], damage[head, found.choice[head]]
        assert damage_at(budgets, curve, share) <= found.damage[head] * (1 + 1e-9) + 1e-12
        below = max(low for low in grid_of(floor, cap, module.STEPS) if low <= share + 1e-9)
        assert found.damage[head] == pytest.approx(
            least_damage(budgets, damage[head], below, floor), rel=1e-6, abs=2e-12
        )
    assert found.bound <= found.damage.sum() * (1 + 1e-9) + 1e-11


@settings(PROPERTY, max_examples=60)
@given(problem=problems(2, 4))
def test_the_bound_is_below_the_best_of_all_allocations_and_the_answer_above(problem):
    budgets, damage, floor, cap, budget = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", COARSE)
        found = allocate(budgets, damage, budget, floor=floor, cap=cap)
    grid = grid_of(floor, cap)
    table = [[least_damage(budgets, curves, share, floor) for share in grid] for curves in damage]
    best = min(
        sum(table[head][place] for head, place in enumerate(places))
        for places in itertools.product(range(len(grid)), repeat=len(damage))
        if sum(grid[place] for place in places) <= budget * len(damage) + 1e-9
    )
    assert found.bound <= best * (1 + 1e-9) + 1e-11
    assert best <= found.damage.sum() * (1 + 1e-9) + 1e-11
    # No more is lost to whole steps than one head's fall.
    steepest = max(row[0] - row[-1] for row in table)
    assert found.damage.sum() <= found.bound + steepest + 1e-9


def convex_curves(generator, heads, points):
    """Damage at 1/16, 2/16, ... that falls ever more slowly, down to 0 at 1."""
    steps = np.sort(generator.random((heads, points)) * generator.choice([0.01, 1, 10], (heads, 1)))
    return steps.cumsum(axis=1)[:, ::-1]


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("seed", range(6))
def test_convex_curves_get_the_optimum_of_dynamic_programming(monkeypatch, seed, heads):
    monkeypatch.setattr(module, "STEPS", 16)
    generator = np.random.default_rng(seed)
    budgets, curves = np.arange(1, 16) / 16, convex_curves(generator, heads, 15)
    table = np.concatenate([curves, np.zeros((heads, 1))], axis=1)
    for slots in range(heads, 16 * heads + 1, max(1, heads // 2)):
        best = np.where(np.arange(slots + 1) == 0, 0.0, np.inf)
        for head in range(heads):
            following = np.full(slots + 1, np.inf)
            for spent in range(slots + 1):
                for given_ in range(1, min(16, spent) + 1):
                    following[spent] = min(following[spent], best[spent - given_] + table[head, given_ - 1])
            best = following
        found = allocate(budgets, curves[:, None], slots / (16 * heads), floor=1 / 16)
        np.testing.assert_allclose(found.share * 16, np.round(found.share * 16), atol=1e-6)
        assert found.damage.sum() == pytest.approx(best[slots], rel=1e-9, abs=1e-11)
        assert found.bound == pytest.approx(best[slots], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("budget", [0.05, 0.13, 0.3, 0.77])
def test_with_many_heads_the_answer_is_close_to_the_bound(budget):
    budgets = np.array(BUDGETS)
    damage = falling_curves(3, 400, 3, len(BUDGETS))
    found = allocate(budgets, damage, budget, floor=0.02)
    assert found.bound <= found.damage.sum() <= found.bound * 1.01
    # And well below the same share for all.
    uniform = sum(least_damage(budgets, curves, budget, [0.02] * 3) for curves in damage)
    assert found.damage.sum() < 0.9 * uniform


@PROPERTY
@given(seed=st.integers(0, 2**31), heads=st.integers(1, 6), budget=st.floats(1 / 16, 1))
def test_convex_curves_lose_nothing_against_equal_shares(seed, heads, budget):
    generator = np.random.default_rng(seed)
    budgets, curves = np.arange(1, 16) / 16, convex_curves(generator, heads, 15)
    found = allocate(budgets, curves[:, None], budget, floor=1 / 16)
    # One step of the grid is not charged in part.
    step = 1 / module.STEPS
    uniform = sum(damage_at(budgets, curve, max(1 / 16, budget - step)) for curve in curves)
    assert found.damage.sum() <= uniform * (1 + 1e-9) + 1e-11


@PROPERTY
@given(problem=problems(), other=st.floats(0, 1))
def test_a_larger_budget_does_no_more_damage(problem, other):
    budgets, damage, floor, cap, first = problem
    second = first + (cap - first) * other
    small, large = (allocate(budgets, damage, budget, floor=floor, cap=cap) for budget in (first, second))
    assert large.damage.sum() <= small.damage.sum() * (1 + 1e-9) + 1e-11
    assert large.bound <= small.bound * (1 + 1e-9) + 1e-11


@PROPERTY
@given(problem=problems(), data=st.data())
def test_the_order_of_heads_does_not_matter_and_answers_repeat(problem, data):
    budgets, damage, floor, cap, budget = problem
    order = data.draw(st.permutations(range(len(damage))))
    found = allocate(budgets, damage, budget, floor=floor, cap=cap)
    again = allocate(budgets, damage.copy(), budget, floor=floor.copy(), cap=cap)
    moved = allocate(budgets, damage[order], budget, floor=floor, cap=cap)
    assert all(
        np.array_equal(getattr(found, name), getattr(again, name)) for name in ("cost", "share", "choice", "damage")
    )
    assert moved.damage.sum() == pytest.approx(found.damage.sum(), rel=1e-9, abs=1e-11)
    assert moved.bound == pytest.approx(found.bound, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.55, 1.0])
def test_equal_heads_and_equal_policies(budget):
    curve = np.array([4.0, 2.0, 1.0, 0.5])
    budgets = np.array([0.1, 0.2, 0.4, 0.8])
    found = allocate(budgets, np.tile(curve, (5, 3, 1)), budget, floor=0.1)
    assert found.share.mean() == pytest.approx(budget, abs=1e-9)
    assert found.choice.tolist() == [0] * 5  # the earlier of equals
    twice = allocate(budgets, np.tile(curve, (5, 3, 1)), budget, floor=0.1)
    assert np.array_equal(found.share, twice.share)


def test_heads_that_cost_nothing_leave_their_slots_to_the_others():
    budgets = np.array([0.1, 0.5])
    damage = np.array([[[0.0, 0.0]], [[8.0, 1.0]], [[0.0, 0.0]]])
    found = allocate(budgets, damage, 0.4, floor=0.1)
    np.testing.assert_allclose(found.share, [0.1, 1.0, 0.1], atol=1e-6)
    # More than anyone needs: the rest is handed out in order, nothing is lost.
    found = allocate(budgets, damage * 0, 0.4, floor=0.1)
    assert found.share.mean() == pytest.approx(0.4, abs=1e-12)
    assert found.damage.sum() == pytest.approx(0, abs=1e-11)


def test_a_budget_of_all_keeps_all():
    damage = falling_curves(5, 7, 2, len(BUDGETS))
    found = allocate(np.array(BUDGETS), damage, 1.0, floor=0.02)
    np.testing.assert_allclose(found.share, 1, atol=1e-12)
    assert found.damage.tolist() == [0] * 7
    assert found.bound == pytest.approx(0, abs=1e-9)


@settings(PROPERTY, max_examples=80)
@given(
    floors=st.lists(st.integers(5, 900), min_size=1, max_size=3),
    below=st.floats(0.01, 0.999),
    seed=st.integers(0, 99),
)
def test_a_budget_below_the_floor_is_told_with_the_range_that_works(floors, below, seed):
    floor = np.array(floors) / 1000 + 0.0003
    damage = falling_curves(seed, 3, len(floors), 3)
    budgets = np.array([0.1, 0.4, 0.7])
    with pytest.raises(MismatchError) as caught:
        allocate(budgets, damage, floor.min() * below, floor=floor)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    low, high = (float(end) for end in re.search(r"ask for a budget from (\S+) to (\S+)$", message).groups())
    assert low == pytest.approx(floor.min(), abs=0.0011)
    for end in (low, high):
        assert allocate(budgets, damage, end, floor=floor).share.mean() == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize("budget", [0, -0.2, 1.2, np.nan])
def test_a_budget_that_is_no_fraction_is_refused(budget):
    with pytest.raises(UsageError, match="is not a fraction of slots to keep"):
        allocate(np.array([0.1, 0.5]), np.ones((2, 1, 2)), budget)


def test_policies_whose_protected_tokens_do_not_fit_are_not_chosen(coarse):
    # The second policy is far better but protects 60%.
    damage = np.array([[[4.0, 3.0], [0.1, 0.05]]] * 3)
    found = allocate(np.array([0.1, 0.8]), damage, 0.45, floor=np.array([0.1, 0.6]))
    assert found.share.mean() == pytest.approx(0.45)
    for share, policy in zip(found.share, found.choice, strict=True):
        assert policy == (share >= 0.6)
    assert set(found.choice) == {0, 1}


@pytest.mark.parametrize("apart", [0.0, 0.0004, 0.003])
@settings(PROPERTY, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(2, 6),
    floor=st.floats(0.01, 0.2),
    above=st.floats(0, 0.01),
)
def test_a_budget_just_above_the_floor_is_kept_however_steep_the_curves(*, apart, seed, heads, floor, above):
    damage = falling_curves(seed, heads, 2, len(BUDGETS), orders=12)
    damage[:, 1] *= 1e-3
    floors, budget = np.array([floor, floor + apart]), floor + above
    found = allocate(np.array(BUDGETS), damage, budget, floor=floors)
    assert found.share.mean() == pytest.approx(budget, abs=1e-9)
    assert (found.share >= floor - 1e-9).all()
    assert (found.share >= floors[found.choice] - 1e-8).all()
