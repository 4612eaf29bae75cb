"""The field's policies: each against its loops, through the real cache, and in what sets it apart."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvprofile import KVMerger, load_profile
from kvprofile import names as known_names
from kvprofile.calibration.observe import observing
from kvprofile.merging import affinity, combine, joining, matching, policies, query_affinity, regression
from kvprofile.merging.combine import Combination
from kvprofile.merging.counts import slots_of
from kvprofile.merging.draws import uniform
from kvprofile.merging.matching import match
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.protect import Protection, protected_tokens
from kvprofile.merging.regression import FROZEN, regress
from kvprofile.merging.scores import MASS_STRIDE, attention_mass, window_mass
from kvprofile.merging.sets import SET_RULES
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Tokens, asked_again, newest_queries
from kvprofile.profile.schema import PolicyFacts
from tests.unit import field_reference as field
from tests.unit.builders import random_tokens, slots_in
from tests.unit.merge_reference import REPLAYED
from tests.unit.reference import PROPERTY, head_of, lost_tokens, merge_head
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

ROOT = Path(__file__).parents[2]
FIELD = [name for name in POLICIES if name not in REPLAYED]
MODEL = {"num_key_value_heads": 2, "num_hidden_layers": 2}


def _heads(slots):
    parts = (slots.keys, slots.values, slots.bias)
    return list(zip(*(part.split(slots.lengths) for part in parts), strict=True))


def _marked(policy, tokens):
    return protected_tokens(policy.protection, tokens, 0).flatten(0, 1).tolist()


# Against loops. `test_policies` draws from all policies; here every one is sure of its turn.


@pytest.mark.parametrize(
    ("name", "position", "sinks"),
    [
        *((name, position, None) for name in FIELD for position in (0, 60)),
        *((name, 0, 1.5) for name in ("zsmerge", "grkv", "again-matched")),
    ],
)
def test_slots_are_those_of_the_loops(name, position, sinks):
    policy, clear = replace(POLICIES[name], seed=3), 0
    for seed, count in ((1, 9), (2, 30), (3, 55)):
        tokens = random_tokens(seed, batch=2, heads=2, count=70, position=position, newer=20)
        if sinks is not None:  # every query head its own, and none for some
            logits = torch.tensor([[sinks, -1.0], [-torch.inf, 2 * sinks]])
            queries, again = (replace(asked, sinks=logits) for asked in (tokens.queries, tokens.again))
            tokens = replace(tokens, queries=queries, again=again)
        epsilon = torch.full((2,), 0.9)
        slots = merge_tokens(tokens, policy, epsilon=epsilon, count=torch.full((2, 2), count))
        assert slots.lengths == [count] * 4
        for place, (found, protected) in enumerate(zip(_heads(slots), _marked(policy, tokens), strict=True)):
            one = head_of(tokens, *divmod(place, 2))
            lost, sure = lost_tokens(policy, one, protected, epsilon=0.9, count=count)
            expected, apart = merge_head(policy, one, lost, protected)
            if min(sure, apart) < 1e-6:
                continue
            clear += 1
            for part, wanted in zip(found, zip(*expected, strict=True), strict=True):
                close = 2e-3 if policy.mends else 1e-5
                np.testing.assert_allclose(part.numpy(), np.stack(wanted), rtol=close, atol=close)
    assert clear >= 9


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("logits", [1, 500])
def test_the_queries_of_a_long_text_are_taken_in_pieces(monkeypatch, logits, sinks):
    tokens = random_tokens(3, batch=2, heads=2, count=70, newer=20)
    if sinks:
        tokens = replace(tokens, queries=replace(tokens.queries, sinks=torch.tensor([[1.5, -1.0], [-torch.inf, 3.0]])))
    whole = query_affinity.decayed(tokens)
    monkeypatch.setattr(query_affinity, "LOGITS", logits)
    torch.testing.assert_close(query_affinity.decayed(tokens), whole, rtol=1e-5, atol=1e-6)


# Through the runtime.


@pytest.mark.parametrize("name", FIELD)
@torch.no_grad()
def test_the_cache_holds_what_the_policy_makes_of_the_prompt(name):
    model, text, prompt = tiny_model(**MODEL), tiny_text(200, batch=2), 150
    policy, shares = POLICIES[name], (0.5, 0.7)
    plan = profile_values(model, [head(name, epsilon=0.2, share=share) for share in shares])
    calls = {}
    with observing(model) as observer:
        observer.read(text[0, :prompt], lambda layer, call, _output: calls.setdefault(layer, call))
    merger = KVMerger.from_profile(plan).attach(model)
    cache = merger.cache()
    model(text[:, :prompt], past_key_values=cache)
    wanted = slots_of(torch.tensor(shares), prompt)
    assert cache.slots() == [[wanted.tolist()] * 2] * 2
    recent = policy.protection.recent_tokens(prompt)
    for layer, call in calls.items():
        tokens = Tokens(
            call.key,
            call.value,
            attention_mass(call.query, call.key, call.softmax, stride=MASS_STRIDE),
            {size: window_mass(call.query, call.key, call.softmax, window=size) for size in (32, 128)},
            0,
            prompt,
            newest_queries(call.query, call.key, call.value, call.softmax, count=policy.queries or 1),
            again=asked_again(call.query, call.key, call.value, call.softmax, call.rotary.turned),
        ).oldest(prompt - recent)
        heavy = policy.protection.heavy_tokens(prompt)
        expected = merge_tokens(
            tokens, policy, epsilon=torch.full((2,), 0.2), count=(wanted - recent)[None], heavy=heavy
        )
        for found, alone in zip(_heads(slots_in(cache.layers[layer].state)), _heads(expected), strict=False):
            for part, own in zip(found, alone, strict=True):
                torch.testing.assert_close(part, own, rtol=1e-3, atol=1e-4)
    full = model(text[:, :prompt], use_cache=False).logits.shape
    for place in range(prompt, 200):
        logits = model(text[:, place : place + 1], past_key_values=cache).logits
        assert logits.isfinite().all()
        for slots, share in zip(cache.slots()[1][0], shares, strict=True):
            assert share * (place + 1) - 1 <= slots <= share * (place + 1) + 33
    assert full[-1] == logits.shape[-1]
    merger.detach()


@torch.no_grad()
def test_a_prompt_in_pieces_meets_the_budget():
    model, text = tiny_model(**MODEL), tiny_text(180)
    plan = profile_values(model, [head("zsmerge", share=0.5), head("expected-attention", share=0.5)])
    cache = KVMerger.from_profile(plan).attach(model).cache()
    for low, high in ((0, 20), (20, 120), (120, 180)):
        model(text[:, low:high], past_key_values=cache)
    assert cache.slots() == [[[90, 90]]] * 2


@torch.no_grad()
def test_a_padded_row_is_what_it_is_alone():
    model, text = tiny_model(**MODEL), tiny_text(150, batch=2)
    plan = profile_values(model, [head("grkv", share=0.5), head("zsmerge", share=0.6)])
    merger = KVMerger.from_profile(plan).attach(model)
    text[1, :40] = 0
    mask = (text != 0).long()
    together = merger.cache()
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    model(text, past_key_values=together, attention_mask=mask, position_ids=places)
    alone = merger.cache()
    model(text[1:, 40:], past_key_values=alone)
    assert together.slots()[1][1] == alone.slots()[1][0]
    for found, own in zip(
        _heads(slots_in(together.layers[1].state))[2:], _heads(slots_in(alone.layers[1].state)), strict=True
    ):
        for part, expected in zip(found, own, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


# Draws.


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    salt=st.integers(0, 15),
    position=st.integers(0, 2**20),
    heads=st.lists(st.integers(0, 63), min_size=1, max_size=3),
)
def test_draws_follow_from_seed_head_and_position(seed, salt, position, heads):
    tokens = replace(random_tokens(0, heads=len(heads), count=5, position=position), heads=tuple(heads), seed=seed)
    expected = [[field.uniform(seed, salt, one, position + place) for place in range(5)] for one in heads]
    np.testing.assert_allclose(uniform(tokens, salt=salt)[0], expected, rtol=1e-6)


def test_draws_are_even_and_unlike_one_another():
    tokens = replace(random_tokens(0, heads=2, count=20_000, head_dim=1, value_dim=1), seed=5)
    draws = [*uniform(tokens, salt=0)[0], uniform(tokens, salt=1)[0, 0], uniform(replace(tokens, seed=6), salt=0)[0, 0]]
    for one in draws:
        counts = torch.histc(one, 20, 0, 1)
        assert ((counts - 1000).abs() < 150).all()  # five standard deviations
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.04
    assert (np.abs(np.corrcoef(torch.stack(draws)) - np.eye(4)) < 0.04).all()


# What sets them apart.


def test_cam_gives_on_average_what_its_expectation_says():
    tokens = random_tokens(4, count=60)
    count = torch.full((1, 2), 30)
    expected = merge_tokens(tokens, POLICIES["cam"], count=count)
    drawn = [merge_tokens(tokens, replace(POLICIES["cam-drawn"], seed=seed), count=count) for seed in range(300)]
    values = torch.stack([one.values for one in drawn])
    error = values.std(0) / math.sqrt(len(drawn))
    assert ((values.mean(0) - expected.values).abs() <= 5 * error + 1e-6).all()
    assert (error > 0).any()
    dropped = merge_tokens(tokens, POLICIES["h2o"], count=count)
    assert all(torch.equal(one.keys, dropped.keys) for one in (expected, drawn[0]))
    assert not torch.equal(expected.values, dropped.values)


@pytest.mark.parametrize("name", ["d2o", "look-m-average", "look-m-pivot", "look-m-weighted"])
def test_the_published_operators_by_hand(name):
    # One survivor looks along x; of the two lost, one is at 60 degrees and one opposite.
    keys = torch.tensor([[2.0, 0.0], [1.0, math.sqrt(3)], [-4.0, 0.0]])[None, None]
    values = torch.tensor([[1.0], [3.0], [5.0]])[None, None]
    tokens = Tokens(keys, values, torch.tensor([[[9.0, 1.0, 1.0]]]), {}, 0, 3)
    policy = replace(POLICIES[name], protection=Protection(first=0))
    slots = merge_tokens(tokens, policy, count=torch.tensor([[1]]))
    share = math.exp(0.5) / (math.e + math.exp(0.5))
    expected = {
        # The mean of the best cosines is (0.5 - 1) / 2 = -0.25: the opposite one is dropped.
        "d2o": (keys[0, 0, 0] * (1 - share) + keys[0, 0, 1] * share, 1 - share + 3 * share),
        "look-m-average": (keys[0, 0].mean(0), 3.0),
        "look-m-pivot": (
            (keys[0, 0, 0] + (keys[0, 0, 0] + keys[0, 0, 1]) / 2 + (keys[0, 0, 0] + keys[0, 0, 2]) / 2) / 3,
            2.0,
        ),
        "look-m-weighted": ((keys[0, 0, 0] + 0.5 * keys[0, 0, 1] - keys[0, 0, 2]) / 3, (1 + 1.5 - 5) / 3),
    }[name]
    torch.testing.assert_close(slots.keys[0], expected[0])
    assert slots.values.item() == pytest.approx(expected[1])
    assert slots.bias.tolist() == [0.0]


def test_keepkv_votes_for_what_joined_and_drops_the_rest():
    tokens = random_tokens(5, count=80)
    tokens = replace(tokens, keys=torch.randn(tokens.keys.shape, generator=torch.Generator().manual_seed(5)))
    count = torch.full((1, 2), 30)
    slots = merge_tokens(tokens, POLICIES["keepkv"], count=count)
    everyone = merge_tokens(
        tokens, replace(POLICIES["keepkv"], combination=Combination("attention", threshold=-1.0)), count=count
    )
    votes = [bias.exp().sum().item() for _, _, bias in _heads(slots)]
    assert all(30 < held < 80 for held in votes)
    assert [bias.exp().sum().item() for _, _, bias in _heads(everyone)] == pytest.approx([80, 80])


@PROPERTY
@given(seed=st.integers(0, 2**31), tokens=st.integers(5, 60), kept=st.integers(1, 60))
def test_residual_slots_hold_all_that_was_lost(seed, tokens, kept):
    kept = min(kept + 4, tokens)
    slots = merge_tokens(random_tokens(seed, count=tokens), POLICIES["zsmerge"], count=torch.full((1, 2), kept))
    for _, _, bias in _heads(slots):
        sizes = bias.exp()
        assert sizes.sum().item() == pytest.approx(tokens if kept > 4 else kept, rel=1e-5)
        shared = sizes[sizes > 1]
        if len(shared):
            assert shared.max() - shared.min() <= 1.001
            assert len(shared) <= math.ceil((kept - 4) / 10)


@pytest.mark.parametrize(("name", "of"), [("gauss-off", "gauss"), ("absorb-off", "absorb"), ("pivot-off", "pivot")])
def test_merge_off_controls_keep_the_pivots_of_the_same_sets(name, of):
    tokens = random_tokens(6, count=50)
    merged = merge_tokens(tokens, POLICIES[of], count=torch.full((1, 2), 20))
    control = merge_tokens(tokens, POLICIES[name], count=torch.full((1, 2), 20))
    assert POLICIES[name].rule == POLICIES[of].rule == "chain"
    keys = replace(POLICIES[of], combination=replace(POLICIES[of].combination, keep_pivot_key=True))
    if POLICIES[of].combination.bias != "attention":  # there the pivot goes by mean attention, not by mass
        assert torch.equal(merge_tokens(tokens, keys, count=torch.full((1, 2), 20)).keys, control.keys)
    assert control.lengths == merged.lengths
    assert not control.bias.any()
    stored = {tuple(key) for key in tokens.keys.flatten(0, 2).tolist()}
    assert {tuple(key) for key in control.keys.tolist()} <= stored


# Regression.


def _outputs(tokens, slots, row=0, kv_head=0):
    """Outputs of the queries that see all of the tokens: over the tokens as they were, and over the slots; float64."""
    one = head_of(tokens, row, kv_head)
    states, newer_keys, newer_values, _ = one.queries
    asked = len(newer_keys)
    keys, values, bias = (part.double().numpy() for part in _heads(slots)[row * 2 + kv_head])
    found = []
    for group in states:
        for place, query in enumerate(group[-asked:]):
            seen = slice(0, place + 1)
            others = np.exp(newer_keys[seen] @ query)
            for old_keys, old_values, old_bias in ((one.keys, one.values, 0.0), (keys, values, bias)):
                weights = np.exp(old_keys @ query + old_bias)
                total = weights.sum() + others.sum()
                found.append((weights @ old_values + others @ newer_values[seen]) / total)
    return np.array(found[::2]), np.array(found[1::2])


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["snapkv", "streaming", "gauss", "absorb", "d2o"]),
    count=st.integers(5, 40),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_regression_never_makes_the_outputs_worse(seed, name, count, dtype):
    tokens = random_tokens(seed, batch=2, heads=2, count=40, newer=7)
    tokens = replace(tokens, keys=tokens.keys.to(dtype), values=tokens.values.to(dtype))
    plain = merge_tokens(tokens, POLICIES[name], count=torch.full((2, 2), count))
    mended = merge_tokens(tokens, replace(POLICIES[name], regression=True), count=torch.full((2, 2), count))
    assert torch.equal(mended.keys, plain.keys)
    assert torch.equal(mended.bias, plain.bias)
    assert (mended.lengths, mended.values.dtype) == (plain.lengths, dtype)
    for place in range(4):
        row, kv_head = divmod(place, 2)
        (wanted, before), (_, after) = (_outputs(tokens, slots, row, kv_head) for slots in (plain, mended))
        was, now = ((wanted - found) ** 2 for found in (before, after))
        assert now.sum() <= was.sum() * (1 + 1e-4) + 1e-9
    if count < 40:
        assert not torch.equal(mended.values, plain.values)
    else:
        assert torch.equal(mended.values, plain.values)


def test_regression_takes_the_safe_path_and_leaves_the_most_attended(monkeypatch):
    tokens = random_tokens(8, count=40, newer=9)
    slots = merge_tokens(tokens, POLICIES["snapkv"], count=torch.full((1, 2), 20))
    mended = regress(tokens, slots)
    changed = (mended.values != slots.values).any(-1).view(2, 20).sum(-1)
    assert changed.tolist() == [20 - math.ceil(20 * FROZEN)] * 2
    # A solution made wrong on purpose, away from the minimum in every direction.
    monkeypatch.setattr(regression, "RIDGE", -1e3)
    assert torch.equal(regress(tokens, slots).values, slots.values)
    for blind in (replace(tokens, queries=None), random_tokens(8, count=40, newer=0)):
        assert regress(blind, slots) is slots
    nothing = Slots(slots.keys[:0], slots.values[:0], slots.bias[:0], [0, 0])
    assert regress(tokens, nothing) is nothing


def _error_again(tokens, slots, row, kv_head):
    """Squared error of the outputs of the queries asked again, which see everything; float64."""
    states, newer_keys, newer_values, _ = head_of(tokens, row, kv_head).again
    one, error = head_of(tokens, row, kv_head), 0.0
    keys, values, bias = (part.double().numpy() for part in _heads(slots)[row * 2 + kv_head])
    for query in np.concatenate(states):
        others, outputs = np.exp(newer_keys @ query), []
        for old_keys, old_values, old_bias in ((one.keys, one.values, 0.0), (keys, values, bias)):
            weights = np.exp(old_keys @ query + old_bias)
            outputs.append((weights @ old_values + others @ newer_values) / (weights.sum() + others.sum()))
        error += ((outputs[0] - outputs[1]) ** 2).sum()
    return error


@PROPERTY
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["snapkv", "gauss", "gather", "d2o"]),
    count=st.integers(5, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_matching_never_makes_the_outputs_worse(seed, name, count, dtype):
    tokens = random_tokens(seed, batch=2, heads=2, count=40, newer=7)
    tokens = replace(tokens, keys=tokens.keys.to(dtype), values=tokens.values.to(dtype))
    plain = merge_tokens(tokens, POLICIES[name], count=torch.full((2, 2), count))
    mended = match(tokens, plain)
    assert torch.equal(mended.keys, plain.keys)
    assert (mended.lengths, mended.values.dtype, mended.bias.dtype) == (plain.lengths, dtype, torch.float32)
    for place in range(4):
        was, now = (_error_again(tokens, slots, *divmod(place, 2)) for slots in (plain, mended))
        assert now <= was * (1 + 1e-4) + 1e-9
    if count == 40:
        assert torch.equal(mended.values, plain.values)
        assert torch.equal(mended.bias, plain.bias)


def test_matching_is_left_out_where_nothing_is_asked_again_or_it_does_not_help(monkeypatch):
    tokens = random_tokens(8, count=40, newer=9)
    slots = merge_tokens(tokens, POLICIES["snapkv"], count=torch.full((1, 2), 20))
    assert not torch.equal(match(tokens, slots).values, slots.values)
    monkeypatch.setattr(matching, "RIDGE", -1e3)  # away from the minimum in every direction
    found = match(tokens, slots)
    assert torch.equal(found.values, slots.values)
    assert torch.equal(found.bias, slots.bias)
    blind = replace(tokens, again=None)
    assert match(blind, slots) is slots
    nothing = Slots(slots.keys[:0], slots.values[:0], slots.bias[:0], [0, 0])
    assert match(tokens, nothing) is nothing


# In a profile, in the docs, and from outside.


def test_the_shipped_profiles_name_policies_as_they_are():
    for path in sorted(ROOT.glob("profiles/*.json")):
        values = json.loads(path.read_text())["policies"]
        for name, facts in load_profile(path).policies.items():
            assert Policy.from_dict(facts.model_dump()) == Policy.from_dict(values[name]) == POLICIES[name]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_fits_the_schema(name):
    values = POLICIES[name].to_dict()
    assert Policy.from_dict(PolicyFacts.model_validate(values).model_dump()) == POLICIES[name]
    with pytest.raises(ValidationError):
        PolicyFacts.model_validate({**values, "affinity": "x key"})


def test_every_name_in_the_tables_fits_the_schema():
    for part, names in (("affinity", affinity.AFFINITIES), ("rule", joining.JOINS)):
        for name in names:
            facts = {**Policy().to_dict(), "affinity": "cosine", part: name}
            assert getattr(PolicyFacts.model_validate(facts), part) == name
    for name in combine.WEIGHTS:
        Combination(weights=name)
        PolicyFacts.model_validate(Policy(combination=Combination(weights=name)).to_dict())
    assert set(SET_RULES) < set(joining.JOINS)
    for known, table in (
        (known_names.Affinity, affinity.AFFINITIES),
        (known_names.Join, joining.JOINS),
        (known_names.Weights, combine.WEIGHTS),
    ):
        assert get_args(known) == tuple(table)


def test_the_docs_list_every_policy_once():
    rows = re.findall(r"^\| `([a-z0-9-]+)`", (ROOT / "docs" / "policies.md").read_text(), re.MULTILINE)
    assert rows == list(POLICIES)


@torch.no_grad()
def test_the_example_of_the_contributing_guide_runs():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a policy")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    tables = {(affinity, "AFFINITIES"), (combine, "WEIGHTS"), (joining, "JOINS"), (policies, "POLICIES")}
    before = {name: set(getattr(module, name)) for module, name in tables}
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    added = {name: set(getattr(module, name)) - before[name] for module, name in tables}
    try:
        (name,) = added["POLICIES"]
        assert added["AFFINITIES"]
        assert added["WEIGHTS"]
        model, text = tiny_model(**MODEL), tiny_text(120)
        plan = profile_values(model, [head(name, share=0.6)] * 2)
        PolicyFacts.model_validate(plan["policies"][name])
        cache = KVMerger.from_profile(plan).attach(model).cache()
        assert model(text, past_key_values=cache).logits.isfinite().all()
        assert cache.slots() == [[[72, 72]]] * 2
        tokens = random_tokens(9, count=30)
        slots = merge_tokens(tokens, POLICIES[name], count=torch.full((1, 2), 12))
        assert [bias.exp().sum().item() for _, _, bias in _heads(slots)] == pytest.approx([30, 30])
    finally:
        for module, table in tables:
            for key in added[table]:
                del getattr(module, table)[key]
