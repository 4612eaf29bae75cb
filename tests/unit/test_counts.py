"""Whole slots from shares: the layer's budget is rounded once, and no head strays by a slot."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.merging.counts import slots_of
from tests.unit.reference import PROPERTY

# Shares as a profile stores them: six decimals, held here as exact fractions of a million.
_shares = st.lists(st.integers(0, 10**6), min_size=1, max_size=12)


@settings(PROPERTY, max_examples=300)
@given(millionths=_shares, tokens=st.integers(0, 200_000))
def test_slots_add_up_and_every_head_is_within_one_of_its_share(millionths, tokens):
    shares = torch.tensor([share / 10**6 for share in millionths], dtype=torch.float64)
    slots = slots_of(shares, tokens)
    assert slots.dtype == torch.int64
    exact = [Fraction(share, 10**6) * tokens for share in millionths]
    total = sum(exact)
    # Halves may go either way: `abs` instead of `round`.
    assert abs(int(slots.sum()) - total) <= Fraction(1, 2) + Fraction(1, 10**4)
    for got, wanted in zip(slots.tolist(), exact, strict=True):
        assert 0 <= got <= tokens
        assert abs(got - wanted) < 1 + Fraction(1, 10**4)
    assert torch.equal(slots, slots_of(shares.clone(), tokens))


@settings(PROPERTY, max_examples=100)
@given(millionths=_shares, tokens=st.integers(1, 5000))
def test_who_lost_more_by_rounding_down_is_served_first(millionths, tokens):
    shares = torch.tensor([share / 10**6 for share in millionths], dtype=torch.float64)
    slots = slots_of(shares, tokens).tolist()
    exact = [Fraction(share, 10**6) * tokens for share in millionths]
    remainder = [wanted - wanted.__floor__() for wanted in exact]
    served = [got > wanted.__floor__() for got, wanted in zip(slots, exact, strict=True)]
    for first in range(len(slots)):
        for second in range(len(slots)):
            if served[second] and not served[first]:
                assert remainder[second] > remainder[first] - Fraction(1, 10**4)


@pytest.mark.parametrize(
    ("shares", "tokens", "expected"),
    [
        ([1.0, 1.0], 17, [17, 17]),
        ([0.0, 0.0], 17, [0, 0]),
        ([0.5, 0.5], 3, [2, 1]),  # a tie goes to the lower head
        ([0.25, 0.25, 0.25, 0.25], 2, [1, 1, 0, 0]),
        ([0.333333, 0.333333, 0.333333], 3, [1, 1, 1]),  # thirds as they are stored
        ([0.3333333, 0.6666667], 3, [1, 2]),
        ([0.1, 0.9], 10, [1, 9]),
        ([0.7], 10, [7]),
        ([0.29], 100, [29]),  # 0.29 * 100 is 28.999999999999996 in binary
        ([0.9, 0.2, 0.2], 4, [3, 1, 1]),
    ],
)
def test_known_cases(shares, tokens, expected):
    assert slots_of(torch.tensor(shares, dtype=torch.float64), tokens).tolist() == expected
