"""Plans: what was solved is what is written down, and what cannot be planned is told with the next step."""

from itertools import pairwise

import numpy as np
import pytest

from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.merging.policies import POLICIES
from kvprofile.names import GRANULARITIES
from kvprofile.planning.allocate import allocate
from kvprofile.planning.plans import make_plan, replan
from kvprofile.planning.solve import solve
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import DamageFacts, PolicyFacts
from tests.unit.builders import THRESHOLDS, build_profile

BUDGETS = [0.1, 0.2, 0.4, 0.8]
NAMES = ["gauss", "value-attention", "streaming"]
TOKENS = 1000  # protected: 36 of them, a share of 0.036
UNIFORM = [(rule, granularity) for rule in ("uniform", "common") for granularity in GRANULARITIES]


def damage_of(seed=0, names=NAMES, orders=3.0):
    """Falling damage `(layers, policies, kv_heads, budgets, kinds)`; every head of another size."""
    generator = np.random.default_rng(seed)
    falls = -np.sort(-generator.uniform(0.1, 4, (2, len(names), 2, len(BUDGETS), 2)), axis=3)
    return falls * 10 ** generator.uniform(1 - orders, 1, (2, 1, 2, 1, 1))


def damaged(names=NAMES):
    """A profile that says damage was measured; its policies are those with damage, and one more."""
    values = build_profile().model_dump()
    values["policies"] = {
        name: PolicyFacts.model_validate(POLICIES[name].to_dict()).model_dump()
        for name in dict.fromkeys([*names, "gauss", "h2o"])
    }
    values["calibration"]["measured"]["tokens"] = TOKENS
    values["statistics"]["damage"] = DamageFacts(
        policies=names,
        budgets=BUDGETS,
        kinds=["recall", "continuation"],
        passages=16,
        passage_tokens=20,
        continuation_tokens=64,
    ).model_dump()
    return Profile.model_validate(values)


def planned(damage, budget=0.4, *, names=NAMES, rule="damage", mode="exact", **arguments):
    profile = damaged(names)
    return make_plan(
        profile.model,
        profile.policies,
        profile.statistics,
        damage,
        budget,
        tokens=TOKENS,
        rule=rule,
        mode=mode,
        **arguments,
    )


def heads_of(plan):
    return [head for layer in plan.layers for head in layer.heads]


def straight(curve, share):
    """Damage at a share, by straight lines between the measured budgets and to 0 at 1."""
    points = [*zip(BUDGETS, curve, strict=True), (1.0, 0.0)]
    for (low, above), (high, below) in pairwise(points):
        if low <= share <= high:
            return above + (below - above) * (share - low) / (high - low)
    return curve[0]


# Shares by damage.


@pytest.mark.parametrize("objective", ["balanced", "recall", "continuation"])
@pytest.mark.parametrize("budget", [0.15, 0.4, 0.7])
def test_shares_follow_damage(objective, budget):
    damage = damage_of()
    cost = {"balanced": damage.sum(-1), "recall": damage[..., 0], "continuation": damage[..., 1]}[objective]
    plan = planned(damage, budget, objective=objective)
    curves = cost.transpose(0, 2, 1, 3).reshape(4, 3, 4)
    expected = allocate(np.array(BUDGETS), curves, budget, floor=0.036)
    heads = heads_of(plan)
    assert [head.share for head in heads] == pytest.approx(expected.share.tolist(), abs=1e-6)
    assert [head.policy for head in heads] == [NAMES[policy] for policy in expected.choice]
    assert plan.damage_bound == pytest.approx(expected.bound, rel=1e-3)
    assert np.mean([head.share for head in heads]) == pytest.approx(budget, abs=1e-6)
    assert (plan.policy, plan.rule, plan.objective, plan.predicted_ratio) == ("auto", "damage", objective, budget)
    for place, head in enumerate(heads):
        wanted = straight(curves[place, NAMES.index(head.policy)], head.share)
        assert head.damage == pytest.approx(wanted, rel=1e-3)
    assert plan.predicted_damage == pytest.approx(sum(head.damage for head in heads), rel=1e-3)
    assert plan.damage_bound <= plan.predicted_damage
    for layer in plan.layers:
        assert layer.share == pytest.approx(np.mean([head.share for head in layer.heads]), abs=1e-6)


def test_a_head_that_hurts_more_gets_more():
    damage = np.tile(np.array([4.0, 2.0, 1.0, 0.25])[:, None] / 2, (2, 3, 2, 1, 2))
    damage[0, :, 1] *= 50
    shares = [head.share for head in heads_of(planned(damage))]
    assert shares[1] > max(shares[0], shares[2], shares[3]) + 0.2


def test_every_head_takes_the_lower_of_two_curves():
    damage = damage_of()
    for place, best in enumerate([2, 0, 1, 2]):
        damage[place // 2, best, place % 2] /= 100
    assert [head.policy for head in heads_of(planned(damage))] == [NAMES[best] for best in (2, 0, 1, 2)]
    # One policy asked for is the policy of all.
    plan = planned(damage, policy="streaming")
    assert {head.policy for head in heads_of(plan)} == {"streaming"}
    assert plan.policy == "streaming"


def test_layers_share_alike_and_choose_together():
    damage = damage_of()
    damage[0, 1] /= 100
    damage[1, 2] /= 100
    plan = planned(damage, granularity="layer")
    curves = damage.sum(-1).sum(axis=2)
    expected = allocate(np.array(BUDGETS), curves, 0.4, floor=0.036)
    for layer, share, name in zip(plan.layers, expected.share, ("value-attention", "streaming"), strict=True):
        assert [head.share for head in layer.heads] == pytest.approx([share] * 2, abs=1e-6)
        assert {head.policy for head in layer.heads} == {name}
        assert layer.share == pytest.approx(share, abs=1e-6)
    assert plan.layers[0].share != plan.layers[1].share
    assert plan.granularity == "layer"


def test_an_objective_refuses_kinds_that_were_not_measured():
    with pytest.raises(UsageError, match=r"none of facts, lookup were measured; .* --probes facts=4,lookups=8"):
        planned(damage_of(), objective="all")


def test_the_objective_all_counts_planted_lines():
    generator = np.random.default_rng(3)
    four = -np.sort(-generator.uniform(0.1, 4, (2, len(NAMES), 2, len(BUDGETS), 4)), axis=3)
    profile = damaged()
    facts = profile.statistics.damage.model_copy(
        update={"kinds": ["recall", "continuation", "facts", "lookup"], "facts": 4, "lookups": 8}
    )
    statistics = profile.statistics.model_copy(update={"damage": facts})
    whole, part = (
        make_plan(profile.model, profile.policies, statistics, four, 0.4, tokens=TOKENS, objective=objective)
        for objective in ("all", "balanced")
    )
    summed = np.stack([four.sum(-1), np.zeros_like(four[..., 0])], axis=-1)
    assert whole.layers == planned(summed).layers
    assert part.layers == planned(four[..., :2]).layers


def test_one_objective_does_not_see_the_other_kind():
    damage = damage_of()
    other = damage.copy()
    other[..., 1] = np.random.default_rng(9).uniform(0, 9, other.shape[:-1])
    assert planned(damage, objective="recall") == planned(other, objective="recall")
    assert planned(damage, objective="continuation") != planned(other, objective="continuation")
    assert planned(damage) != planned(other)
    # By the name of the kind, not by its place.
    profile = damaged()
    facts = profile.statistics.damage.model_copy(update={"kinds": ["continuation", "recall"]})
    swapped = profile.statistics.model_copy(update={"damage": facts})
    arguments = {"tokens": TOKENS, "objective": "recall"}
    found = make_plan(profile.model, profile.policies, swapped, damage[..., ::-1], 0.4, **arguments)
    assert found == planned(damage, objective="recall")


def test_the_protected_tokens_are_the_floor():
    damage = damage_of()
    plan = planned(damage, 0.05)
    assert min(head.share for head in heads_of(plan)) >= 0.036 - 1e-6
    with pytest.raises(MismatchError, match=r"budget 0\.03 is out of reach.*ask for a budget from 0\.036 to 1"):
        planned(damage, 0.03)


@pytest.mark.parametrize("name", ["value-attention", "gauss"])
def test_the_protected_tokens_are_the_floor_of_equal_shares_too(name):
    # A share of 0.01 of 1000 tokens are 10 slots, and 36 tokens keep theirs whatever the plan says.
    profile = damaged()
    if name == "gauss":
        curves = {"ratio": [[0.036, 0.3, 0.6, 1.0]] * 2}
        layers = [layer.model_copy(update=curves) for layer in profile.statistics.layers]
        profile = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"layers": layers})})
    with pytest.raises(MismatchError, match=r"budget 0\.01 is out of reach.*ask for a budget from 0\.036 to 1"):
        replan(profile, damage_of(), 0.01, policy=name, rule="uniform", mode="exact")


def test_a_budget_of_all_predicts_no_damage():
    plan = planned(damage_of(), 1.0)
    assert (plan.predicted_damage, plan.predicted_ratio) == (0.0, 1.0)
    assert {(head.share, head.damage, head.epsilon) for head in heads_of(plan)} == {(1.0, 0.0, None)}


def test_thresholds_belong_to_the_shares_of_heads_that_go_by_cosine():
    damage = damage_of(orders=0.1)
    damage[:, 0, 0] /= 3
    damage[:, 1, 1] /= 3
    plan = planned(damage, 0.3)
    assert all(head.share < 1 for head in heads_of(plan))
    for layer in plan.layers:
        first, second = layer.heads
        assert (first.policy, second.policy) == ("gauss", "value-attention")
        assert first.epsilon == pytest.approx(np.interp(first.share, [0.1, 0.3, 0.6, 1.0], THRESHOLDS), abs=1e-5)
        assert second.epsilon is None


@pytest.mark.parametrize("policy", ["auto", "value-attention"])
def test_threshold_mode_needs_cosine_in_every_head(policy):
    damage = damage_of()
    damage[1, 1, 0] /= 1000  # one head of four is better off by attention
    with pytest.raises(UsageError, match=r"threshold mode needs policies that go by cosine.* or use exact mode"):
        planned(damage, policy=policy, mode="threshold")
    plan = planned(damage, policy="gauss", mode="threshold")
    assert plan.mode == "threshold"
    assert all(head.epsilon is not None or head.share == 1 for head in heads_of(plan))


def test_damage_that_was_not_measured_is_asked_for():
    with pytest.raises(UsageError, match=r"no damage was measured.*give --rule uniform, or calibrate anew"):
        planned(None)
    profile = build_profile()
    with pytest.raises(UsageError, match="no damage was measured"):
        replan(profile, damage_of(), 0.5, rule="damage", mode="exact")
    with pytest.raises(UsageError, match=r"measured for gauss, value-attention, streaming, not for h2o; choose one"):
        planned(damage_of(), policy="h2o")


@pytest.mark.parametrize("names", [NAMES, NAMES[1:]])
def test_equal_shares_of_the_policy_that_is_best_for_all(names):
    damage = damage_of(names=names)
    for best, name in enumerate(names):
        better = damage.copy()
        better[:, best] /= 100
        plan = planned(better, 0.4, names=names, rule="uniform")
        assert {head.policy for head in heads_of(plan)} == {name}
        assert [head.share for head in heads_of(plan)] == pytest.approx([0.4] * 4)
        curves = better.sum(-1)[:, best].reshape(4, -1)
        assert plan.predicted_damage == pytest.approx(sum(straight(curve, 0.4) for curve in curves), rel=1e-3)
        assert plan.damage_bound is None


def test_a_policy_without_damage_predicts_none():
    plan = planned(damage_of(), policy="h2o", rule="uniform")
    assert plan.predicted_damage is None
    assert {head.damage for head in heads_of(plan)} == {None}
    with pytest.raises(UsageError, match="the policy h2o goes by mass, which has no common threshold"):
        planned(damage_of(), policy="h2o", rule="common")


def test_the_answer_beats_equal_shares():
    for seed in range(5):
        damage = damage_of(seed)
        own, even = (planned(damage, 0.3, rule=rule).predicted_damage for rule in ("damage", "uniform"))
        assert own <= even * 1.02


# Shares by the compression curves.


def test_a_plan_says_what_was_solved():
    profile = build_profile()
    curves = np.array([layer.ratio for layer in profile.statistics.layers])
    for rule, granularity in UNIFORM:
        plan = make_plan(
            profile.model,
            profile.policies,
            profile.statistics,
            None,
            0.6,
            tokens=64,
            policy="gauss",
            rule=rule,
            granularity=granularity,
            mode="threshold",
        )
        solution = solve(np.array(THRESHOLDS), curves, 0.6, rule=rule, granularity=granularity)
        assert (plan.budget, plan.rule, plan.granularity, plan.mode) == (0.6, rule, granularity, "threshold")
        assert (plan.predicted_ratio, plan.predicted_damage, plan.damage_bound) == (0.6, None, None)
        assert [layer.layer for layer in plan.layers] == [0, 1]
        for row, layer in enumerate(plan.layers):
            assert {head.policy for head in layer.heads} == {"gauss"}
            assert [head.epsilon for head in layer.heads] == pytest.approx(solution.epsilon[row].tolist(), abs=1e-6)
            assert [head.share for head in layer.heads] == pytest.approx(solution.share[row].tolist(), abs=1e-6)
            assert layer.epsilon == pytest.approx(np.interp(0.6, curves[row].mean(axis=0), THRESHOLDS), abs=1e-6)
            assert layer.share == pytest.approx(0.6, abs=1e-6)


def test_a_plan_covers_the_full_attention_layers_only():
    values = build_profile().model_dump()
    values["model"]["attention"] = ["sliding_attention", "full_attention"]
    values["plan"]["layers"] = values["plan"]["layers"][1:]
    # Curves of the sliding layer that would change the plan if they were read.
    values["statistics"]["layers"][0]["ratio"] = [[0.9, 0.9, 0.9, 1.0]] * 2
    profile = replan(Profile.model_validate(values), None, 0.5)
    (layer,) = profile.plan.layers
    assert layer.layer == 1
    assert [head.share for head in layer.heads] == [0.5, 0.5]
    assert [head.epsilon for head in layer.heads] == pytest.approx([0.7, 0.5])


def test_damage_is_of_the_full_attention_layers_in_order():
    values = damaged().model_dump()
    values["model"]["attention"] = ["sliding_attention", "full_attention"]
    values["plan"]["layers"] = values["plan"]["layers"][1:]
    damage = damage_of()
    plan = replan(Profile.model_validate(values), damage[1:], 0.4, policy="auto", rule="damage", mode="exact").plan
    assert [layer.layer for layer in plan.layers] == [1]
    expected = allocate(np.array(BUDGETS), damage[1].sum(-1).transpose(1, 0, 2), 0.4, floor=0.036)
    assert [head.share for head in heads_of(plan)] == pytest.approx(expected.share.tolist(), abs=1e-6)


def test_a_model_without_full_attention_is_told_in_one_line():
    values = build_profile().model_dump()
    values["model"]["attention"] = ["sliding_attention"] * 2
    values["plan"]["layers"] = []
    profile = Profile.model_validate(values)
    with pytest.raises(KVProfileError, match=r"no full-attention layer.* use its stock cache"):
        replan(profile, None, 0.5)


def test_replanning_keeps_all_but_plan_and_check():
    profile, damage = damaged(), damage_of()
    choices = {"policy": "auto", "rule": "damage", "objective": "recall", "granularity": "layer", "mode": "exact"}
    other = replan(profile, damage, 0.4, **choices)
    assert other.check is None
    assert other.plan.budget == 0.4
    assert {name: getattr(other.plan, name) for name in choices} == choices
    assert other.model_copy(update={"plan": profile.plan, "check": profile.check}) == profile
    # What is not given stays.
    again = replan(other, damage, 0.6)
    assert {name: getattr(again.plan, name) for name in choices} == choices
    assert Profile.model_validate_json(again.to_json()) == again
    # Solving depends on the statistics alone, not on the plan before.
    assert replan(again, damage, 0.4) == other


def test_the_whole_budget_is_written_as_null():
    plan = replan(build_profile(), None, 1.0).plan
    assert [(layer.epsilon, layer.share) for layer in plan.layers] == [(None, 1.0)] * 2
    assert {(head.epsilon, head.share) for layer in plan.layers for head in layer.heads} == {(None, 1.0)}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("rule", "equal", "unknown rule 'equal'; expected one of damage, uniform, common"),
        ("objective", "speed", "unknown objective 'speed'; expected one of balanced, recall, continuation"),
        ("granularity", "token", "unknown granularity 'token'; expected one of head, layer"),
        ("mode", "fast", "unknown mode 'fast'; expected one of exact, threshold"),
        ("policy", "magic", "unknown policy 'magic'; expected one of auto, gauss"),
    ],
)
def test_unknown_arguments_are_refused_with_the_known_ones(argument, value, message):
    with pytest.raises(UsageError, match=message):
        replan(build_profile(), None, 0.5, **{argument: value})


def test_the_reachable_range_of_a_profile_is_told():
    with pytest.raises(MismatchError, match=r"ask for a budget from 0\.200 to 1"):
        replan(build_profile(), None, 0.1)
    assert replan(build_profile(), None, 0.2).plan.predicted_ratio == 0.2


@pytest.mark.parametrize("name", POLICIES)
def test_policies_without_thresholds_are_planned_in_exact_mode(name):
    profile = build_profile(policy=name)
    facts = {name: PolicyFacts.model_validate(POLICIES[name].to_dict())}
    arguments = (profile.model, facts, profile.statistics, None, 0.6)
    choices = {"tokens": 64, "policy": name, "rule": "uniform"}
    assert make_plan(*arguments, **choices, mode="exact").predicted_ratio == 0.6
    if POLICIES[name].affinity == "cosine":
        assert make_plan(*arguments, **choices, mode="threshold").mode == "threshold"
    else:
        with pytest.raises(UsageError, match=r"threshold mode needs policies that go by cosine.* exact mode"):
            make_plan(*arguments, **choices, mode="threshold")
