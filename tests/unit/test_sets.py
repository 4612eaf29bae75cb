"""Sets against a literal scan in float64, and the toy map of KVMerger's Fig. 4."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.calibration.measure.ratios import THRESHOLDS, count_sets
from kvprofile.merging.combine import Combination, combine
from kvprofile.merging.sets import MAX_SET, SET_RULES, adjacent_cosine, banded_cosine, find_sets
from tests.unit.reference import PROPERTY, clear_of, cosine, cosines, scan_sets, starts_of

FIG4 = """
1
.9 1
.8 .9 1
.7 .7 .9 1
.6 .7 .9 .9 1
.7 .6 .8 .8 .9 1
.7 .6 .6 .7 .7 .7 1
.6 .6 .7 .7 .7 .6 .8 1
"""
FIG4_MASS = [5.3, 2.0, 1.7, 0.4, 3.0, 0.5, 1.9, 6.8]
FIG4_SETS = {
    "anchor": [[0, 1], [2, 3, 4, 5], [6, 7]],
    "complete": [[0, 1], [2, 3, 4, 5], [6, 7]],
    "chain": [[0, 1, 2, 3, 4, 5], [6, 7]],
}


def _fig4_table():
    table = np.eye(8)
    for row, line in enumerate(FIG4.strip().splitlines()):
        table[row, : row + 1] = [float(entry) for entry in line.split()]
    return np.maximum(table, table.T)


def _fig4_keys():
    """Keys whose cosines print as the figure's table, which as printed is no matrix of cosines (not semidefinite).

    Alternating projections onto the matrices that round to the table on the right side of .8, and onto the semidefinite
    ones with unit diagonal.
    """
    table = _fig4_table()
    low = np.where(table >= 0.8, np.maximum(table - 0.045, 0.802), table - 0.045)
    high = table + 0.045
    gram = table
    for _ in range(300):
        values, vectors = np.linalg.eigh(np.clip(gram, low, high))
        keys = vectors * np.sqrt(values.clip(0))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        gram = keys @ keys.T
    return keys


@pytest.fixture(name="fig4")
def _fig4():
    table, keys = _fig4_table(), _fig4_keys()
    assert np.linalg.eigvalsh(table)[0] < -0.01  # the reason for the projections
    gram = cosines(keys)
    assert (gram.round(1) == table).all()
    assert ((gram >= 0.8) == (table >= 0.8)).all()
    assert np.abs(gram - 0.8)[~np.eye(8, dtype=bool)].min() > 1e-3
    return torch.tensor(keys, dtype=torch.float32)[None, None]


@pytest.mark.parametrize("rule", SET_RULES)
def test_fig4_sets(fig4, rule):
    starts = find_sets(fig4, torch.tensor([0.8]), rule, torch.zeros(1, 1, 8, dtype=torch.bool))
    assert starts[0, 0].tolist() == starts_of(FIG4_SETS[rule])
    assert scan_sets(cosines(fig4[0, 0]), 0.8, rule, [False] * 8) == FIG4_SETS[rule]


@pytest.mark.parametrize("rule", ["anchor", "complete"])
def test_fig4_pivots(fig4, rule):
    protected = torch.zeros(1, 1, 8, dtype=torch.bool)
    starts = find_sets(fig4, torch.tensor([0.8]), rule, protected)
    names = torch.arange(1.0, 9.0).view(1, 1, 8, 1)
    slots = combine(fig4, names, starts, torch.tensor(FIG4_MASS)[None, None], Combination(weights="pivot"))
    assert slots.values.squeeze(1).tolist() == [1, 5, 8]
    assert torch.equal(slots.keys, fig4[0, 0, [0, 4, 7]])


# Small whole numbers make equal, opposite and zero keys common.
_adversarial = st.integers(1, 3).flatmap(
    lambda dim: st.lists(st.lists(st.integers(-2, 2), min_size=dim, max_size=dim), min_size=1, max_size=14)
)


def _walk(seed, tokens, step):
    generator = np.random.default_rng(seed)
    return generator.normal(size=4) + step * generator.normal(size=(tokens, 4)).cumsum(0)


_walks = st.builds(_walk, st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.05, 0.3, 1.0]))
_keys = st.one_of(_adversarial, _walks).map(lambda keys: np.asarray(keys, dtype=np.float32))


def _protect(draw, tokens):
    kind = draw(st.sampled_from(["none", "all", "some"]))
    if kind != "some":
        return [kind == "all"] * tokens
    return draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))


@settings(PROPERTY, max_examples=150)
@given(data=st.data(), keys=_keys, rule=st.sampled_from(SET_RULES))
def test_sets_of_every_head_are_the_scans(data, keys, rule):
    tokens = len(keys)
    # The second head reads the same keys backwards, under a threshold and protected tokens of its own.
    heads = [keys, keys[::-1].copy()]
    similar = [cosines(head) for head in heads]
    epsilon = [clear_of(gram, data.draw(st.floats(0, 1, exclude_max=True))) for gram in similar]
    protected = [_protect(data.draw, tokens) for _ in heads]
    starts = find_sets(
        torch.tensor(np.stack(heads))[None], torch.tensor(epsilon), rule, torch.tensor(protected).view(1, 2, tokens)
    )
    for head in range(2):
        expected = scan_sets(similar[head], epsilon[head], rule, protected[head])
        assert starts[0, head].tolist() == starts_of(expected)


@pytest.mark.parametrize("rule", SET_RULES)
@pytest.mark.parametrize(("tokens", "step"), [(MAX_SET - 1, 0), (MAX_SET, 0), (MAX_SET + 1, 0), (300, 0), (300, 0.02)])
@pytest.mark.parametrize("guarded", [(), (70, 71, 200)])
def test_sets_longer_than_the_band(rule, tokens, step, guarded):
    keys = _walk(5, tokens, step)
    similar = (keys @ keys.T) / np.outer(np.linalg.norm(keys, axis=1), np.linalg.norm(keys, axis=1))
    epsilon = clear_of(similar, 0.3) if step else 0.9
    protected = [token in guarded for token in range(tokens)]
    expected = scan_sets(similar, epsilon, rule, protected)
    found = find_sets(
        torch.tensor(keys, dtype=torch.float32)[None, None],
        torch.tensor([epsilon]),
        rule,
        torch.tensor(protected)[None, None],
    )
    assert found[0, 0].tolist() == starts_of(expected)
    longest = max(len(members) for members in expected)
    if step == 0 and not guarded:
        assert longest == (tokens if rule == "chain" else min(tokens, MAX_SET))


def test_an_infinite_threshold_merges_nothing():
    keys = torch.ones(1, 2, 5, 3)
    for rule in SET_RULES:
        starts = find_sets(keys, torch.tensor([torch.inf, 0.9]), rule, torch.zeros(1, 2, 5, dtype=torch.bool))
        assert starts[0].tolist() == [[True] * 5, [True] + [False] * 4]


def test_zero_keys_are_similar_to_nothing_and_opposite_keys_to_everything_only_at_minus_one():
    keys = torch.tensor([[0.0, 0], [0, 0], [1, 0], [-1, 0]])[None, None]
    free = torch.zeros(1, 1, 4, dtype=torch.bool)
    for rule in SET_RULES:
        assert find_sets(keys, torch.tensor([0.1]), rule, free)[0, 0].all()
        assert find_sets(keys, torch.tensor([-1.1]), rule, free)[0, 0].tolist() == [True, False, False, False]


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="unknown set rule 'nearest'; expected one of chain, anchor, complete"):
        find_sets(torch.ones(1, 1, 2, 2), torch.tensor([0.5]), "nearest", torch.zeros(1, 1, 2, dtype=torch.bool))


@PROPERTY
@given(keys=_keys)
def test_adjacent_cosines_are_the_loops(keys):
    expected = [cosine(older, newer) for older, newer in pairwise(keys)]
    np.testing.assert_allclose(adjacent_cosine(torch.tensor(keys)).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 255, 256, 257, 520])
@pytest.mark.parametrize("band", [1, 7, MAX_SET - 1])
def test_the_band_holds_the_cosines_before_each_token(tokens, band):
    keys = _walk(tokens, tokens, 0.5).astype(np.float32)
    protected = np.random.default_rng(tokens).random(tokens) < 0.1
    unit = keys.astype(np.float64) / np.linalg.norm(keys.astype(np.float64), axis=1, keepdims=True)
    found = banded_cosine(torch.tensor(keys), torch.tensor(protected), band).numpy()
    assert found.shape == (tokens, min(band, tokens))
    for token in range(tokens):
        for place in range(found.shape[1]):
            other = token - 1 - place
            if other < 0 or protected[token] or protected[other]:
                assert found[token, place] == -np.inf
            else:
                assert found[token, place] == pytest.approx(unit[token] @ unit[other], abs=2e-6)


@settings(PROPERTY, max_examples=25)
@given(data=st.data(), keys=_keys, rule=st.sampled_from(SET_RULES))
def test_counts_at_every_threshold_are_those_of_the_sets_found_there(data, keys, rule):
    tokens = len(keys)
    protected = torch.tensor([_protect(data.draw, tokens), [False] * tokens]).view(2, tokens)
    both = torch.tensor(np.stack([keys, keys[::-1]]))
    counts = count_sets(both, protected, rule)
    assert counts.shape == (2, len(THRESHOLDS))
    for at, threshold in enumerate(THRESHOLDS):
        epsilon = torch.full((2,), float(threshold))
        starts = find_sets(both[None], epsilon, rule, protected[None])
        assert counts[:, at].tolist() == starts.sum(-1)[0].tolist()


@pytest.mark.parametrize("rule", SET_RULES)
def test_counts_are_those_of_the_scan(rule):
    keys = _walk(11, 150, 0.3)
    similar = (keys @ keys.T) / np.outer(np.linalg.norm(keys, axis=1), np.linalg.norm(keys, axis=1))
    protected = [token < 4 or token in (90, 91) for token in range(150)]
    near = np.array([np.abs(similar - threshold).min() for threshold in THRESHOLDS])
    counts = count_sets(torch.tensor(keys, dtype=torch.float32)[None], torch.tensor(protected)[None], rule)[0]
    compared = [at for at in range(len(THRESHOLDS)) if near[at] > 1e-6]
    assert len(compared) > len(THRESHOLDS) / 2
    for at in compared:
        assert counts[at] == len(scan_sets(similar, THRESHOLDS[at], rule, protected))


@PROPERTY
@given(data=st.data(), keys=_keys)
def test_chain_count_is_tokens_less_links(data, keys):
    tokens = len(keys)
    protected = _protect(data.draw, tokens)
    counts = count_sets(torch.tensor(keys)[None], torch.tensor([protected]), "chain")[0]
    pairs = [t for t in range(tokens - 1) if not protected[t] and not protected[t + 1]]
    links = np.array([cosine(keys[t], keys[t + 1]) for t in pairs])
    for at, threshold in enumerate(THRESHOLDS):
        if not len(links) or np.abs(links - threshold).min() > 1e-6:
            assert counts[at] == tokens - (links >= threshold).sum()
    assert counts[-1] == tokens
