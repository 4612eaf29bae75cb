"""Policies: every head ends with the slots asked for, holding what a float64 loop says, whatever company it is merged in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvprofile.merging.affinity import AFFINITIES
from kvprofile.merging.combine import Combination
from kvprofile.merging.losses import most_affine
from kvprofile.merging.merge import merge_layer, merge_tokens
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.protect import Protection, protected_tokens
from kvprofile.merging.sets import SET_RULES
from kvprofile.merging.tokens import Tokens
from tests.unit.builders import random_tokens
from tests.unit.reference import PROPERTY, affinities, clear_of, cosines, head_of, lost_tokens, merge_head

NAMES = list(POLICIES)
DROPS = ["h2o", "value-attention", "snapkv", "snapkv-128", "streaming"]
MERGES = [name for name in NAMES if POLICIES[name].rule in SET_RULES and not name.endswith("-off")]
BIASED = [name for name in MERGES if POLICIES[name].combination.bias == "count"]
# Rules the named policies do not use, so that these are covered too.
EXTRA = {
    "complete": Policy("cosine", "complete", Protection(first=2)),
    "anchor, rms, counted": Policy("cosine", "anchor", Protection(first=0)),
    "unprotected chain": Policy(protection=Protection(first=0, recent=0)),
    "heavy chain": Policy(protection=Protection(first=1, heavy_share=0.2)),
    "anchor by attention": Policy("cosine", "anchor", combination=Combination("attention", bias="attention")),
    "average, attention's bias": Policy(combination=Combination("average", bias="attention")),
    "average, pivot's key kept": Policy(combination=Combination(weights="average", keep_pivot_key=True)),
}
ALL = {**POLICIES, **EXTRA}


def _protected(policy, tokens, heavy):
    """The first tokens of the text and the heaviest, by loops: a list per batch row and head."""
    marked = []
    for masses in tokens.mass.flatten(0, 1).tolist():
        heaviest = sorted(range(len(masses)), key=lambda t: -masses[t])[:heavy]
        first = range(max(0, policy.protection.first - tokens.position))
        marked.append([t in heaviest or t in first for t in range(len(masses))])
    return marked


def _heads(slots):
    """Keys, values and biases of every head."""
    parts = (slots.keys, slots.values, slots.bias)
    return list(zip(*(part.split(slots.lengths) for part in parts), strict=True))


def _same(first, second):
    return first.lengths == second.lengths and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("keys", "values", "bias")
    )


def _assert_same(found, expected):
    """Equal up to the order of summation."""
    assert found.lengths == expected.lengths
    for name in ("keys", "values", "bias"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)


def _rows(tokens, rows):
    """Some rows of the batch."""
    windows = {size: received[rows] for size, received in tokens.windows.items()}

    def asked(queries):
        if queries is None:
            return None
        return replace(queries, **{part: getattr(queries, part)[rows] for part in ("states", "keys", "values")})

    parts = {part: getattr(tokens, part)[rows] for part in ("keys", "values", "mass")}
    return replace(tokens, **parts, windows=windows, queries=asked(tokens.queries), again=asked(tokens.again))


def _epsilon(tokens, fraction=0.5):
    """One threshold a head, clear of every cosine of every batch row."""
    return torch.tensor(
        [
            clear_of(
                np.concatenate([cosines(keys).ravel() for keys in tokens.keys[:, head].double().numpy()]), fraction
            )
            for head in range(tokens.keys.shape[1])
        ]
    )


@st.composite
def _cases(draw):
    heavy = draw(st.integers(0, 5))
    tokens = random_tokens(
        draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        count=draw(st.integers(1, 24)),
        position=draw(st.sampled_from([0, 2, 100])),
        drift=draw(st.sampled_from([0.1, 1.0])),
    )
    return ALL[draw(st.sampled_from(list(ALL)))], tokens, heavy, draw(st.floats(0, 1, exclude_max=True))


def _assert_loops(policy, tokens, heavy, epsilon, count):
    """Compare with the loops; True unless a decision is within single precision."""
    slots = merge_tokens(tokens, policy, epsilon=epsilon, count=count, heavy=heavy)
    protected = _protected(policy, tokens, heavy)
    batch, kv_heads = tokens.keys.shape[:2]
    heads = _heads(slots)
    for place in range(batch * kv_heads):
        row, head = divmod(place, kv_heads)
        one = head_of(tokens, row, head)
        lost, margin = lost_tokens(
            policy,
            one,
            protected[place],
            epsilon=None if epsilon is None else float(epsilon[head]),
            count=None if count is None else int(count[row, head]),
        )
        if margin < 2e-5:
            return False
        expected, clear = merge_head(policy, one, lost, protected[place])
        if clear < 2e-5:
            return False
        # Solving for values multiplies rounding errors.
        relative = 2e-3 if policy.mends else 1e-5
        assert slots.lengths[place] == len(expected)
        for found, wanted in zip(heads[place], zip(*expected, strict=True), strict=False):
            wanted = np.stack(wanted)  # noqa: PLW2901
            np.testing.assert_allclose(
                found.numpy(), wanted, rtol=relative, atol=relative * max(1e-30, np.abs(wanted).max())
            )
    return True


@settings(PROPERTY, max_examples=150)
@given(case=_cases(), data=st.data())
def test_slots_for_a_count_are_the_loops(case, data):
    policy, tokens, heavy, fraction = case
    batch, kv_heads, number = tokens.keys.shape[:3]
    count = data.draw(st.lists(st.integers(-2, number + 2), min_size=batch * kv_heads, max_size=batch * kv_heads))
    epsilon = _epsilon(tokens, fraction) if policy.rule in ("anchor", "complete") else None
    assume(_assert_loops(policy, tokens, heavy, epsilon, torch.tensor(count).view(batch, kv_heads)))


@settings(PROPERTY, max_examples=150)
@given(case=_cases())
def test_slots_for_a_threshold_are_the_loops(case):
    policy, tokens, heavy, fraction = case
    if policy.rule in ("anchor", "complete"):
        epsilon = _epsilon(tokens, fraction)
    else:
        batch, kv_heads = tokens.keys.shape[:2]
        epsilon = torch.tensor(
            [
                clear_of(
                    [
                        value
                        for row in range(batch)
                        for value in affinities(policy.affinity, head_of(tokens, row, head))
                        if np.isfinite(value)
                    ],
                    fraction,
                )
                for head in range(kv_heads)
            ]
        )
    assume(_assert_loops(policy, tokens, heavy, epsilon, None))


@settings(PROPERTY, max_examples=200)
@given(case=_cases(), data=st.data())
def test_every_head_ends_with_the_slots_asked_for(case, data):
    policy, tokens, heavy, fraction = case
    batch, kv_heads, number = tokens.keys.shape[:3]
    forced = [sum(map(bool, marks)) for marks in _protected(policy, tokens, heavy)]
    asked = [data.draw(st.integers(low, number)) for low in forced]
    epsilon = torch.full((kv_heads,), fraction * 2 - 1)
    slots = merge_tokens(tokens, policy, epsilon=epsilon, count=torch.tensor(asked).view(batch, kv_heads), heavy=heavy)
    assert slots.lengths == asked
    # Fewer than protected tokens force cannot be had: then it is as few as they allow.
    least = merge_tokens(tokens, policy, epsilon=epsilon, count=torch.zeros(batch, kv_heads).long() - 3, heavy=heavy)
    assert least.lengths == forced


def test_links_inside_a_set_are_closed_before_any_other():
    # Anchor sets by their cosine with the newest token: the second and third key join it, though they point apart, and the
    # oldest does not, though it points almost where its neighbour does.
    angles = torch.tensor([-80.0, -70.0, 70.0, 0.0]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]
    tokens = Tokens(keys, torch.arange(4.0).view(1, 1, 4, 1), torch.ones(1, 1, 4), {}, 0, 4)
    policy = Policy("cosine", "anchor", Protection(first=0), Combination(weights="average"))
    found = {
        count: merge_tokens(
            tokens, policy, epsilon=torch.tensor([0.3]), count=None if count is None else torch.tensor([[count]])
        )
        for count in (None, 3, 2, 1)
    }
    assert {count: slots.values.squeeze(1).tolist() for count, slots in found.items()} == {
        None: [0.0, 2.0],
        3: [0.0, 1.0, 2.5],  # split where the set's neighbours are least alike
        2: [0.0, 2.0],
        1: [1.5],
    }


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("name", ALL)
def test_with_a_slot_for_every_token_nothing_changes(name, extra):
    tokens = random_tokens(1, batch=2, heads=3, count=20, drift=0.1)
    count = torch.full((2, 3), 20 + extra)
    slots = merge_tokens(tokens, ALL[name], epsilon=torch.full((3,), 0.2), count=count, heavy=2)
    assert torch.equal(slots.keys, tokens.keys.flatten(0, 2))
    assert torch.equal(slots.values, tokens.values.flatten(0, 2))
    assert slots.bias.tolist() == [0.0] * 120
    assert slots.lengths == [20] * 6


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("count", [6, 13])
def test_slots_count_for_all_tokens_they_hold(name, count):
    tokens = random_tokens(2, batch=2, heads=3, count=30)
    slots = merge_tokens(
        tokens, POLICIES[name], epsilon=torch.full((3,), 0.8), count=torch.full((2, 3), count), heavy=1
    )
    held = [bias.exp().sum().item() for _, _, bias in _heads(slots)]
    if POLICIES[name].combination.bias == "attention":
        assert all(count < one < 30 for one in held)
    else:
        assert held == pytest.approx([30.0 if name in BIASED else count] * 6, rel=1e-6)


@pytest.mark.parametrize("count", [0, 5, 11])
@pytest.mark.parametrize("name", DROPS)
def test_dropping_keeps_the_protected_and_the_best_of_the_rest(name, count):
    policy = POLICIES[name]
    tokens = random_tokens(3, batch=2, heads=2, count=18)
    slots = merge_tokens(tokens, policy, count=torch.full((2, 2), count), heavy=3)
    for place, marks in enumerate(_protected(policy, tokens, 3)):
        row, head = divmod(place, 2)
        per_query = head_of(tokens, row, head).mean_attention()
        worth = {
            "h2o": tokens.mass[row, head].tolist(),
            "value-attention": (tokens.values[row, head].norm(dim=-1).double() * torch.tensor(per_query)).tolist(),
            "snapkv": tokens.windows[32][row, head].tolist(),
            "snapkv-128": tokens.windows[128][row, head].tolist(),
            "streaming": list(range(18)),
        }[name]
        kept = {t for t in range(18) if marks[t]}
        for token in sorted(range(18), key=lambda t: -worth[t]):
            if len(kept) < count:
                kept.add(token)
        keys, values, bias = _heads(slots)[place]
        assert torch.equal(keys, tokens.keys[row, head, sorted(kept)])
        assert torch.equal(values, tokens.values[row, head, sorted(kept)])
        assert not bias.any()


@pytest.mark.parametrize("name", DROPS)
def test_of_equals_the_older_is_dropped(name):
    tokens = random_tokens(4, heads=1, count=6, position=50)
    ones = torch.ones(1, 1, 6)
    # One unit of attention for every query that could give it, where it is the mean that counts.
    mass = tokens.seen - 50 - torch.arange(6.0)[None, None] if name == "value-attention" else ones
    tokens = replace(
        tokens, mass=mass, values=torch.ones_like(tokens.values), windows=dict.fromkeys(tokens.windows, ones)
    )
    slots = merge_tokens(tokens, POLICIES[name], count=torch.tensor([[2]]))
    assert torch.equal(slots.keys, tokens.keys[0, 0, 4:])


@settings(PROPERTY, max_examples=80)
@given(case=_cases())
def test_protected_tokens_survive_bit_for_bit(case):
    policy, tokens, heavy, fraction = case
    policy = replace(policy, regression=False, matching=False)  # they change values everywhere, on purpose
    batch, kv_heads = tokens.keys.shape[:2]
    epsilon = torch.full((kv_heads,), fraction * 2 - 1)
    slots = merge_tokens(tokens, policy, epsilon=epsilon, count=torch.zeros(batch, kv_heads).long(), heavy=heavy)
    for place, marks in enumerate(_protected(policy, tokens, heavy)):
        row, head = divmod(place, kv_heads)
        keys, values, bias = _heads(slots)[place]
        # In the order of the text, each with its own value, and counting once.
        stored = [(*key, *value) for key, value in zip(keys.tolist(), values.tolist(), strict=True)]
        places = []
        for token in [token for token, marked in enumerate(marks) if marked]:
            own = (*tokens.keys[row, head, token].tolist(), *tokens.values[row, head, token].tolist())
            places.append(stored.index(own))
            assert bias[places[-1]] == 0
        assert places == sorted(places)


@pytest.mark.parametrize("name", [*DROPS, *MERGES, *EXTRA])
@pytest.mark.parametrize("count", [None, 9])
def test_slots_are_in_the_order_of_the_text(name, count):
    # 6 protected tokens and the 3 pieces between them: with fewer slots a set may reach to both sides of a protected one.
    tokens = random_tokens(5, heads=3, count=25)
    places = torch.arange(25.0).expand(1, 3, 25)[..., None]
    policy = replace(ALL[name], combination=replace(ALL[name].combination, scale_values=False))
    slots = merge_tokens(
        replace(tokens, values=places),
        policy,
        epsilon=torch.tensor([0.0, 0.5, 0.9]),
        count=None if count is None else torch.full((1, 3), count),
        heavy=2,
    )
    for _, values, _ in _heads(slots):
        assert (values.diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [None, 1, 5])
def test_equal_keys_give_no_nan(name, count):
    tokens = replace(random_tokens(6, batch=2, count=12, position=9), keys=torch.ones(2, 2, 12, 4))
    count = None if count is None else torch.full((2, 2), count)
    slots = merge_tokens(tokens, ALL[name], epsilon=torch.full((2,), 0.9), count=count)
    for part in (slots.keys, slots.values, slots.bias):
        assert part.isfinite().all()
    torch.testing.assert_close(slots.keys, torch.ones_like(slots.keys))
    if count is not None:
        assert slots.lengths == count.flatten().tolist()


@pytest.mark.parametrize("count", [None, 6])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_rows_and_a_layer_its_heads(name, count):
    tokens = random_tokens(7, batch=3, heads=3, count=22)
    policy, heavy = ALL[name], 2
    epsilon = torch.tensor([0.2, 0.6, 0.9]) * (-1 if policy.affinity not in ("cosine", "age") else 1)
    counts = None if count is None else torch.arange(9).view(3, 3) + count
    together = merge_tokens(tokens, policy, epsilon=epsilon, count=counts, heavy=heavy)
    for row in range(3):
        one = slice(row, row + 1)
        alone = merge_tokens(
            _rows(tokens, one),
            policy,
            epsilon=epsilon,
            count=None if counts is None else counts[one],
            heavy=heavy,
        )
        assert alone.lengths == together.lengths[row * 3 : row * 3 + 3]
        for found, wanted in zip(_heads(together)[row * 3 : row * 3 + 3], _heads(alone), strict=True):
            for part, expected in zip(found, wanted, strict=True):
                # A system of equations amplifies rounding, and its products are batched otherwise.
                close = 1e-5 if policy.mends else 1e-6
                torch.testing.assert_close(part, expected, rtol=close, atol=close)
    order = [2, 0, 1]
    permuted = merge_tokens(
        tokens.of_heads(order),
        policy,
        epsilon=epsilon[order],
        count=None if counts is None else counts[:, order],
        heavy=heavy,
    )
    assert permuted.lengths == [together.lengths[row * 3 + head] for row in range(3) for head in order]
    for place, found in enumerate(_heads(permuted)):
        row, head = divmod(place, 3)
        for part, expected in zip(found, _heads(together)[row * 3 + order[head]], strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


@PROPERTY
@given(
    names=st.lists(st.sampled_from(list(ALL)), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
    counted=st.booleans(),
    heavy=st.integers(0, 3),
)
def test_heads_under_several_policies_are_merged_as_if_alone(names, seed, counted, heavy):
    tokens = random_tokens(seed, batch=2, heads=4, count=16)
    epsilon = torch.tensor([0.1, 0.5, 0.8, torch.inf])
    count = torch.arange(8).view(2, 4) + 6 if counted else None
    followers = {}
    for head, name in enumerate(names):
        followers.setdefault(name, []).append(head)
    groups = tuple((ALL[name], tuple(heads)) for name, heads in followers.items())
    # Every policy protects another number of heavy hitters.
    heavies = tuple(heavy + place for place in range(len(groups)))
    layer = merge_layer(tokens, groups, epsilon=epsilon, count=count, heavy=heavies)
    for place, found in enumerate(_heads(layer)):
        row, head = divmod(place, 4)
        one = tokens.of_heads([head])
        alone = merge_tokens(
            _rows(one, [row]),
            ALL[names[head]],
            epsilon=epsilon[[head]],
            count=None if count is None else count[[row]][:, [head]],
            heavy=heavies[list(followers).index(names[head])],
        )
        for part, expected in zip(found, (alone.keys, alone.values, alone.bias), strict=True):
            close = 1e-5 if ALL[names[head]].mends else 1e-6  # systems of equations, batched otherwise
            torch.testing.assert_close(part, expected, rtol=close, atol=close)


@pytest.mark.parametrize("name", ALL)
def test_policies_need_only_what_they_say(name):
    policy = ALL[name]
    tokens = random_tokens(8, heads=2, count=15)
    bare = replace(
        tokens,
        mass=tokens.mass if policy.needs_mass else None,
        windows={} if policy.window is None else {policy.window: tokens.windows[policy.window]},
        queries=tokens.queries.newest(policy.queries) if policy.queries else None,
    )
    arguments = {"epsilon": torch.tensor([0.4, 0.7]), "count": torch.full((1, 2), 6)}
    heavy = 2 if policy.protection.heavy_share else 0
    assert _same(
        merge_tokens(bare, policy, heavy=heavy, **arguments), merge_tokens(tokens, policy, heavy=heavy, **arguments)
    )


@pytest.mark.parametrize("name", ALL)
def test_policies_round_trip_through_plain_values(name):
    values = ALL[name].to_dict()
    assert Policy.from_dict(values) == ALL[name]
    assert Policy.from_dict(values).to_dict() == values
    for part in (values, values["protection"], values["combination"]):
        part["surprise"] = 1
        with pytest.raises(TypeError, match="surprise"):
            Policy.from_dict(values)
        del part["surprise"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", "cluster"), "unknown rule 'cluster'; expected one of chain, anchor, complete, drop"),
        (("beauty", "chain"), "unknown affinity 'beauty'; expected one of cosine, displacement"),
        (("mass", "anchor"), "the rule anchor goes by cosine, not by mass"),
        (("age", "complete"), "the rule complete goes by cosine, not by age"),
    ],
)
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Policy(*arguments)


def test_what_is_missing_is_said():
    tokens = random_tokens(9)
    with pytest.raises(ValueError, match="either thresholds or slot counts are needed"):
        merge_tokens(tokens, POLICIES["gauss"])
    with pytest.raises(ValueError, match="the rule anchor needs thresholds"):
        merge_tokens(tokens, POLICIES["kvmerger"], count=torch.ones(1, 2))
    with pytest.raises(ValueError, match="needs attention received"):
        AFFINITIES["mass"](replace(tokens, mass=None))
    with pytest.raises(ValueError, match="needs the attention mass"):
        protected_tokens(Protection(), replace(tokens, mass=None), 1)


@PROPERTY
@given(first=st.integers(0, 9), position=st.integers(0, 9), heavy=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_protected_tokens_are_the_first_and_the_heaviest(first, position, heavy, seed):
    tokens = random_tokens(seed, batch=2, count=8, position=position)
    policy = Policy(protection=Protection(first=first))
    marked = protected_tokens(policy.protection, tokens, heavy)
    assert marked.flatten(0, 1).tolist() == _protected(policy, tokens, heavy)


@pytest.mark.parametrize(
    ("protection", "tokens", "recent", "heavy"),
    [
        (Protection(), 2048, 32, 0),
        (Protection(), 10, 10, 0),
        (POLICIES["kvmerger"].protection, 100, 17, 12),
        (POLICIES["kvmerger"].protection, 101, 18, 13),
        (Protection(recent=5, recent_share=0.1), 30, 5, 0),
        (Protection(recent=5, recent_share=0.1), 60, 6, 0),
        (Protection(recent=0, recent_share=1.0, heavy_share=1.0), 9, 9, 9),
    ],
)
def test_shares_of_the_text_are_rounded_up(protection, tokens, recent, heavy):
    assert (protection.recent_tokens(tokens), protection.heavy_tokens(tokens)) == (recent, heavy)


@settings(PROPERTY, max_examples=150)
@given(
    affinity=st.lists(st.integers(-2, 2), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_most_affine_of_the_allowed_are_marked_the_older_of_equals_first(affinity, data):
    tokens = len(affinity)
    allowed = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    losses = data.draw(st.integers(-2, tokens + 2))
    marked = most_affine(
        torch.tensor(affinity, dtype=torch.float32)[None, None],
        torch.tensor(allowed)[None, None],
        torch.tensor([[losses]]),
    )
    expected = [False] * tokens
    for _ in range(losses):
        left = [t for t in range(tokens) if allowed[t] and not expected[t]]
        if left:
            expected[max(left, key=lambda t: (affinity[t], -t))] = True
    assert marked[0, 0].tolist() == expected
