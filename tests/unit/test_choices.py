"""Choices with a cost: on small instances no allocation of all is better than the bound, and whole is a choice of its own."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.errors import MismatchError
from kvprofile.planning.allocate import allocate, spend
from kvprofile.planning.choices import Choice, Curve, lower_envelope
from kvprofile.planning.reach import check_reach
from tests.unit.reference import PROPERTY
from tests.unit.test_allocate import damage_at, falling_curves

STEPS = 12


def damage_of(choice, head, cost):
    """What one head suffers from a choice that a cost pays, by the definition; inf where it does not pay the floor."""
    if cost >= choice.all_cost - 1e-9:
        return float(choice.whole[head, 0])
    share = min((cost - choice.apart) / choice.slot, choice.curve.shares[-1])
    return np.inf if share < choice.floor - 1e-9 else damage_at(choice.curve.shares, choice.curve.damage[head], share)


@st.composite
def problems(draw, least=2, most=3):
    heads, count, points = draw(st.integers(least, most)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    shares = np.array(sorted(draw(st.sets(st.integers(1, 19), min_size=points, max_size=points)))) / 20
    seed = draw(st.integers(0, 2**31))
    damage = falling_curves(seed, heads, count, points, orders=draw(st.sampled_from([1, 4])))
    choices = []
    for index in range(count):
        slot = draw(st.sampled_from([1.0, 0.53, 0.28]))
        apart = draw(st.sampled_from([0.0, 0.02]))
        whole = damage[:, index, -1:] * draw(st.sampled_from([0.0, 0.01]))
        all_cost = 1.0 if slot == 1 else slot + apart
        floor = draw(st.sampled_from([0.02, 0.1]))
        choices.append(Choice(Curve(shares, damage[:, index]), floor, whole, slot, apart, all_cost, bridged=False))
    lowest = min(choice.least_cost for choice in choices)
    return choices, draw(st.floats(lowest, max(choice.all_cost for choice in choices)))


@settings(PROPERTY, max_examples=120)
@given(problem=problems())
def test_the_best_of_all_allocations_lies_between_the_bound_and_the_answer(problem):
    choices, budget = problem
    envelope = lower_envelope(choices, STEPS)
    found = spend(envelope, budget)
    heads = len(found.cost)
    table = [[min(damage_of(one, head, cost) for one in choices) for cost in envelope.costs] for head in range(heads)]
    np.testing.assert_allclose(envelope.damage, table, rtol=1e-6, atol=2e-12)
    best = min(
        sum(table[head][place] for head, place in enumerate(places))
        for places in itertools.product(range(len(envelope.costs)), repeat=heads)
        if envelope.costs[list(places)].sum() <= budget * heads + 1e-9
    )
    assert found.bound <= best * (1 + 1e-9) + 1e-11
    assert best <= found.damage.sum() * (1 + 1e-9) + 1e-11
    assert found.damage.sum() <= found.bound + max(row[0] - row[-1] for row in table) + 1e-9
    assert found.cost.mean() == pytest.approx(budget, abs=1e-9)
    for head, index in enumerate(found.choice):
        # The share that is given costs no more than the head may spend, and does no more damage than was charged.
        choice, share = choices[index], found.share[head]
        cost = choice.all_cost if share == 1 else choice.apart + choice.slot * share
        assert cost <= found.cost[head] + 1e-9
        assert choice.floor - 1e-8 <= share
        assert share == 1 or share <= choice.curve.shares[-1]
        assert damage_of(choice, head, cost) <= found.damage[head] * (1 + 1e-6) + 2e-12


def test_where_a_slot_costs_one_the_answer_is_that_of_slots():
    shares, damage = np.array([0.1, 0.3, 0.6]), falling_curves(4, 9, 3, 3)
    choices = [Choice(Curve(shares, damage[:, index]), 0.05) for index in range(3)]
    for budget in (0.1, 0.37, 0.8, 1.0):
        expected = allocate(shares, damage, budget, floor=0.05)
        found = spend(lower_envelope(choices, 256), budget)
        for name in ("cost", "share", "choice", "damage"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
        assert found.bound == expected.bound


def test_no_share_is_given_between_the_last_that_was_measured_and_all():
    curve = Curve(np.array([0.1, 0.9]), np.array([[1.0, 0.1]]))
    choice = Choice(curve, 0.05, whole=1e-6, slot=0.5, all_cost=0.5, bridged=False)
    costs = np.array([0.4, 0.45, 0.46, 0.4999, 0.5, 0.7])
    np.testing.assert_allclose(choice.share(costs), [0.8, 0.9, 0.9, 0.9, 1.0, 1.0])
    np.testing.assert_allclose(choice.damage(costs)[0, 1:], [0.1, 0.1, 0.1, 1e-6, 1e-6], rtol=1e-12)
    # Its cost is on the grid, whatever the steps.
    assert 0.5 in lower_envelope([choice], 7).costs


@pytest.mark.parametrize(
    ("asked", "low", "high", "told"),
    [
        (
            0.1,
            0.2,
            1.0,
            "budget 0.1 is out of reach: protected tokens keep at least 0.200 of the slots of every head; ",
        ),
        (0.7, 0.2, 0.6004, "ask for a budget from 0.200 to 0.600"),
        (0.1, 0.20001, 1.0, "ask for a budget from 0.201 to 1"),
    ],
)
def test_out_of_reach_is_said_with_the_range_that_works(asked, low, high, told):
    with pytest.raises(MismatchError) as caught:
        check_reach(asked, low, high)
    assert told in str(caught.value)
    check_reach(low, low, high)
    check_reach(high, low, high)
