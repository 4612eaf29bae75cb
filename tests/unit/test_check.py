"""The check's numbers: intervals that hold their mean, and ratios and distances summed up as they should be."""

import numpy as np
import pytest

from kvprofile.evaluate.intervals import bootstrap


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, 400).tolist()
    low, high = bootstrap(values)
    spread = 1.96 * np.std(values) / 20
    assert (low, high) == (
        pytest.approx(np.mean(values) - spread, abs=0.04),
        pytest.approx(np.mean(values) + spread, abs=0.04),
    )
    assert bootstrap(values) == (low, high)


def test_one_sample_or_equal_samples_have_no_spread():
    assert bootstrap([0.25]) == (0.25, 0.25)
    assert bootstrap([0.5] * 7) == (0.5, 0.5)


def test_a_few_samples_stay_within_their_range():
    low, high = bootstrap([1.0, 2.0, 4.0])
    assert 1 <= low < 7 / 3 < high <= 4
