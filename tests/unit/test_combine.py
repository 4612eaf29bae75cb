"""One slot per set: keys, values and biases against a float64 loop, and the bookkeeping of ragged slots."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvprofile.merging.combine import Combination, combine
from tests.unit.reference import PROPERTY, merge_set, pivot_of

COMBINATIONS = {
    "sigma 5": Combination(sigma=5.0),
    "mean": Combination(sigma="mean"),
    "rms": Combination(sigma="rms"),
    "average": Combination(weights="average"),
    "pivot": Combination(weights="pivot"),
    "pivot's key kept": Combination(sigma="rms", keep_pivot_key=True),
    "average, pivot's key kept": Combination(weights="average", keep_pivot_key=True),
    "values scaled": Combination(sigma=5.0, scale_values=True, bias="none"),
    "pivot, no bias": Combination(weights="pivot", bias="none"),
    "attention": Combination(weights="attention"),
    "attention, pivot's key kept": Combination(weights="attention", keep_pivot_key=True, bias="attention"),
    "sigma 5, attention's bias": Combination(sigma=5.0, bias="attention"),
    "similarity": Combination(weights="similarity"),
    "midpoints": Combination(weights="midpoints", bias="none"),
    "average, values scaled": Combination(weights="average", scale_values=True),
}


NEED_MASS = [name for name, one in COMBINATIONS.items() if "attention" in (one.weights, one.bias)]


def _sets(starts):
    sets = []
    for token, opens in enumerate(starts):
        if opens:
            sets.append([token])
        else:
            sets[-1].append(token)
    return sets


def _assert_close(found, expected):
    expected = np.asarray(expected, dtype=np.float64)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def _assert_loops(keys, values, starts, mass, combination):
    slots = combine(keys, values, starts, mass, combination)
    expected, lengths = [], []
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            sets = _sets(starts[row, head].tolist())
            weigh = None if mass is None else mass[row, head].tolist()
            expected += [
                merge_set(keys[row, head].tolist(), values[row, head].tolist(), members, weigh, combination)
                for members in sets
            ]
            lengths.append(len(sets))
    assert slots.lengths == lengths
    for found, wanted in zip((slots.keys, slots.values, slots.bias), zip(*expected, strict=True), strict=True):
        _assert_close(found, np.stack(wanted))
    assert slots.bias.dtype == torch.float32


@st.composite
def _inputs(draw):
    """Two batch rows of two heads; small whole numbers, so that equal keys and equal masses are common."""
    tokens, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    coarse = draw(st.booleans())

    def tensor(*shape):
        numbers = generator.integers(-2, 3, shape) if coarse else generator.normal(size=shape) * 2
        return torch.tensor(numbers, dtype=torch.float32)

    starts = torch.tensor(generator.random((2, 2, tokens)) < draw(st.sampled_from([0.0, 0.4, 1.0])))
    starts[..., 0] = True
    mass = tensor(2, 2, tokens).abs() if draw(st.booleans()) else None
    return tensor(2, 2, tokens, 3), tensor(2, 2, tokens, 2), starts, mass


@settings(PROPERTY, max_examples=100)
@given(inputs=_inputs(), name=st.sampled_from(list(COMBINATIONS)))
def test_slots_are_the_loops(inputs, name):
    assume(inputs[3] is not None or name not in NEED_MASS)
    _assert_loops(*inputs, COMBINATIONS[name])


@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_slots_of_long_sets_are_the_loops(name):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 3, 120, 8, generator=generator).cumsum(2)
    values = torch.randn(2, 3, 120, 5, generator=generator)
    starts = torch.rand(2, 3, 120, generator=generator) < 0.05
    starts[..., 0] = True
    _assert_loops(keys, values, starts, torch.rand(2, 3, 120, generator=generator), COMBINATIONS[name])


@settings(PROPERTY, max_examples=40)
@given(inputs=_inputs(), name=st.sampled_from(list(COMBINATIONS)))
def test_weights_are_convex_and_nothing_is_lost_in_the_count(inputs, name):
    keys, values, starts, mass = inputs
    assume(mass is not None or name not in NEED_MASS)
    combination = COMBINATIONS[name]
    slots = combine(keys, torch.ones_like(values), starts, mass, combination)
    ones = slots.values
    if combination.scale_values:
        sizes = [len(members) for head in starts.flatten(0, 1).tolist() for members in _sets(head)]
        ones = ones / torch.tensor(sizes)[:, None]
    torch.testing.assert_close(ones, torch.ones_like(ones))
    if combination.bias == "attention":
        return
    held = [piece.exp().sum().item() for piece in slots.bias.split(slots.lengths)]
    expected = [keys.shape[2]] * 4 if combination.bias == "count" else slots.lengths
    assert held == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_sets_of_one_token_are_kept_bit_for_bit(name, dtype):
    generator = torch.Generator().manual_seed(2)
    keys = (torch.randn(1, 2, 40, 4, generator=generator) * 100).to(dtype)
    values = (torch.randn(1, 2, 40, 4, generator=generator) / 3).to(dtype)
    starts = torch.rand(1, 2, 40, generator=generator) < 0.6
    starts[..., 0] = True
    slots = combine(keys, values, starts, torch.rand(1, 2, 40, generator=generator), COMBINATIONS[name])
    assert slots.keys.dtype == slots.values.dtype == dtype
    row, alone = 0, 0
    for head in range(2):
        for members in _sets(starts[0, head].tolist()):
            if len(members) == 1:
                assert torch.equal(slots.keys[row], keys[0, head, members[0]])
                assert torch.equal(slots.values[row], values[0, head, members[0]])
                assert slots.bias[row] == 0
                alone += 1
            row += 1
    assert row == len(slots.keys) == sum(slots.lengths)
    assert alone > 10


@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_pivot_keys_and_values_are_kept_bit_for_bit(name):
    combination = COMBINATIONS[name]
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 1, 12, 4, generator=generator)
    starts = torch.tensor([True, False, False, True, True, False, False, False, True, False, True, False])[None, None]
    mass = torch.tensor([1.0, 5, 5, 2, 0, 0, 0, 0, 9, 3, 3, 9])
    slots = combine(keys, values, starts, mass[None, None], combination)
    pivots = [pivot_of(members, mass.tolist()) for members in _sets(starts[0, 0].tolist())]
    assert pivots == [2, 3, 7, 8, 11]  # the newest of equals
    assert torch.equal(slots.keys, keys[0, 0, pivots]) == (combination.weights == "pivot" or combination.keep_pivot_key)
    assert torch.equal(slots.values, values[0, 0, pivots]) == (combination.weights == "pivot")


def test_without_mass_the_newest_token_is_the_pivot():
    keys = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(4))
    starts = torch.tensor([True, False, False, True, True, False])[None, None]
    slots = combine(keys, keys, starts, None, Combination(weights="pivot"))
    assert torch.equal(slots.keys, keys[0, 0, [2, 3, 5]])


@pytest.mark.parametrize("key", [0.0, 1.0, 1e-6, 300.0])
@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_equal_keys_are_averaged_and_never_nan(name, key):
    combination = COMBINATIONS[name]
    keys = torch.full((1, 2, 6, 3), key)
    values = torch.arange(12.0).view(1, 2, 6, 1)
    starts = torch.tensor([True, False, False, False, True, False]).expand(1, 2, 6)
    slots = combine(keys, values, starts, torch.ones(1, 2, 6), combination)
    torch.testing.assert_close(slots.keys, torch.full((4, 3), key))
    sizes = torch.tensor([[4.0], [2.0], [4.0], [2.0]])
    means, newest = torch.tensor([[1.5], [4.5], [7.5], [10.5]]), torch.tensor([[3.0], [5], [9], [11]])
    expected = newest if combination.weights == "pivot" else means * (sizes if combination.scale_values else 1)
    if combination.weights == "midpoints":
        expected = (means + newest) / 2  # half of every weight is the pivot's
    if combination.weights == "similarity" and not key:
        # A zero key has no direction: its cosine with the pivot is 0, and the pivot's own 1.
        expected = (means * sizes + newest * (math.e - 1)) / (sizes + math.e - 1)
    torch.testing.assert_close(slots.values, expected)


@PROPERTY
@given(inputs=_inputs(), name=st.sampled_from(NEED_MASS))
def test_a_bias_by_attention_hands_the_pivot_what_the_set_received(inputs, name):
    keys, values, starts, mass = inputs
    assume(mass is not None)
    mass = mass + 0.25
    slots = combine(keys, values, starts, mass, replace(COMBINATIONS[name], bias="attention"))
    held = 0
    for head, (open_, received) in enumerate(zip(starts.flatten(0, 1).tolist(), mass.flatten(0, 1), strict=True)):
        for place, members in enumerate(_sets(open_)):
            bias = slots.bias[sum(slots.lengths[:head]) + place].item()
            pivot = received[pivot_of(list(members), received.tolist())].item()
            assert pivot * math.exp(bias) == pytest.approx(received[members].sum().item(), rel=1e-5)
            # Never below what the heaviest alone counts for, never above a slot for each.
            assert -1e-6 <= bias <= math.log(len(members)) + 1e-6
            held += 1
    assert held == len(slots.bias)


@pytest.mark.parametrize("name", NEED_MASS)
def test_attention_that_was_not_measured_is_asked_for(name):
    keys = torch.ones(1, 1, 4, 2)
    with pytest.raises(ValueError, match="need the attention mass"):
        combine(keys, keys, torch.tensor([[[True, False, True, False]]]), None, COMBINATIONS[name])


def test_a_far_token_has_no_weight_and_no_nan():
    keys = torch.tensor([[0.0], [1e4]])[None, None]
    values = torch.tensor([[3.0], [7.0]])[None, None]
    starts = torch.tensor([[[True, False]]])
    slots = combine(keys, values, starts, torch.tensor([[[2.0, 1.0]]]), Combination(sigma=0.5))
    assert slots.keys.tolist() == [[0.0]]
    assert slots.values.tolist() == [[3.0]]


def test_inputs_are_left_alone():
    keys, values = torch.randn(2, 1, 2, 8, 3, generator=torch.Generator().manual_seed(5))
    before = keys.clone(), values.clone()
    slots = combine(keys, values, torch.tensor([True, False] * 4).expand(1, 2, 8), torch.ones(1, 2, 8), Combination())
    slots.keys.zero_()
    slots.values.zero_()
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "median"}, "unknown weights 'median'; expected one of gaussian, attention, average, pivot"),
        ({"bias": "size"}, "unknown bias 'size'; expected one of count, attention, none"),
        ({"bias": True}, "unknown bias True; expected one of count"),
        ({"sigma": "max"}, "unknown sigma 'max'; expected a number or one of mean, rms"),
        ({"threshold": 1.5}, "threshold must be a cosine from -1 to 1 or mean, got 1.5"),
        ({"threshold": "median"}, "threshold must be a cosine from -1 to 1 or mean, got 'median'"),
        ({"sigma": 0.0}, "sigma must be above 0, got 0"),
        ({"sigma": -1.0}, "sigma must be above 0, got -1"),
        ({"sigma": math.nan}, "sigma must be above 0, got nan"),
    ],
)
def test_impossible_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Combination(**options)
