"""Plans for bytes: spent on slots and on bits, from below, and said in parts; and what cannot be planned."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile import KVMerger, load_model, load_profile
from kvprofile.codecs.table import CODECS
from kvprofile.errors import MismatchError, UsageError
from kvprofile.planning.plans import make_plan, replan
from kvprofile.planning.sizes import NOTHING, Sizes, sizes_of
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import DamageFacts
from tests.unit.conftest import run
from tests.unit.reference import PROPERTY
from tests.unit.test_plans import BUDGETS, NAMES, TOKENS, damage_of, damaged, heads_of

STORED = ["int8", "int4", "int2"]
SHARES = [0.3, 1.0]


def codec_arrays(seed=0, scale=1e-4):
    """What codecs do `(layers, policies, kv_heads, shares, codecs, kinds)`: about 16 times as much every two bits."""
    generator = np.random.default_rng(seed)
    shape = (2, 1, 2, len(SHARES), len(STORED), 2)
    each = np.array([1.0, 250.0, 4000.0])[:, None]
    keys, values = (scale * each * 10 ** generator.uniform(-1, 1, shape) for _ in range(2))
    return {"key_codec_damage": keys, "value_codec_damage": values / 10}


def coded_profile(head_dim=64):
    profile = damaged()
    facts = profile.statistics.damage.model_dump()
    facts |= {"codecs": STORED, "codec_policies": ["value-attention"], "codec_shares": SHARES}
    statistics = profile.statistics.model_copy(update={"damage": DamageFacts.model_validate(facts)})
    return profile.model_copy(
        update={"statistics": statistics, "model": profile.model.model_copy(update={"head_dim": head_dim})}
    )


def planned(amount=None, *, seed=0, profile=None, measured=None, **choices):
    profile = profile or coded_profile()
    return make_plan(
        profile.model,
        profile.policies,
        profile.statistics,
        damage_of(seed) * 1e-2,
        bytes=amount,
        tokens=TOKENS,
        measured=codec_arrays(seed) if measured is None else measured,
        **choices,
    )


def log_between(share, shares, damage):
    return float(np.exp(np.interp(share, shares, np.log(damage))))


def bytes_of(plan, tokens=TOKENS, dim=64, block=16, recent=32):
    """Bytes over those of a 16-bit cache, counted part by part."""
    total = 0
    for layer in plan.layers:
        if all(head.share == 1 and head.key_codec == head.value_codec == "none" for head in layer.heads):
            total += len(layer.heads) * tokens * dim * 4
            continue
        for head in layer.heads:
            blocks = -(-(round(head.share * tokens) - recent) // block)
            codes = CODECS[head.key_codec].nbytes(dim) + CODECS[head.value_codec].nbytes(dim)
            bias = 4 if head.key_codec == head.value_codec == "none" else 2 * (head.share < 1)
            mean = 0 if head.key_codec == "none" else 4 * dim
            total += blocks * (block * (codes + bias) + 12) + recent * (dim * 4 + 4) + mean + 16
    return total / (len(plan.layers) * len(plan.layers[0].heads) * tokens * dim * 4)


AMOUNTS = [0.07, 0.1, 0.15, 0.25, 0.35, 0.5, 0.6, 0.8, 1.0]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_the_bytes_are_met_from_below_and_said(amount, granularity):
    plan = planned(amount, granularity=granularity)
    assert plan.bytes == amount
    assert plan.predicted_bytes == pytest.approx(bytes_of(plan), abs=2e-6)
    assert plan.predicted_bytes <= amount
    # Four heads of 1,000 tokens: a block of one of them is 0.4% of the cache, and what a whole layer jumps by up to 6%.
    assert plan.predicted_bytes > min(amount, 0.56) - (0.02 if granularity == "head" else 0.07)
    assert (
        plan.budget == plan.predicted_ratio == pytest.approx(np.mean([head.share for head in heads_of(plan)]), abs=1e-6)
    )
    assert plan.codec == "auto"
    if granularity == "layer":
        for layer in plan.layers:
            assert len({(head.share, head.policy, head.key_codec, head.value_codec) for head in layer.heads}) == 1


@pytest.mark.parametrize("amount", AMOUNTS)
def test_damage_is_that_of_the_slots_and_of_each_codec(amount):
    plan, arrays, slots = planned(amount), codec_arrays(), damage_of() * 1e-2
    for place, head in enumerate(heads_of(plan)):
        row, column = divmod(place, 2)
        curve = [*slots[row, NAMES.index(head.policy), column].sum(-1), 0.0]
        own = np.interp(head.share, [*BUDGETS, 1.0], curve)
        at = np.zeros(len(SHARES))
        for codec, name in ((head.key_codec, "key_codec_damage"), (head.value_codec, "value_codec_damage")):
            if codec != "none":
                at += arrays[name][row, 0, column, :, STORED.index(codec)].sum(-1)
        codecs = log_between(head.share, SHARES, at) if at.any() else 0.0
        assert head.codec_damage == pytest.approx(codecs, rel=1e-3, abs=1e-12)
        assert head.damage == pytest.approx(own + codecs, rel=1e-3, abs=1e-12)
    assert plan.predicted_damage == pytest.approx(sum(head.damage for head in heads_of(plan)), rel=2e-3)
    assert plan.predicted_codec_damage == pytest.approx(sum(head.codec_damage for head in heads_of(plan)), rel=2e-3)


def test_a_head_may_keep_all_as_it_is_which_takes_a_little_more_than_the_stock_cache():
    """A head that hurts far more than others is left alone, and with all of the bytes every head is."""
    profile, damage = coded_profile(), damage_of() * 1e-2
    damage[0, :, 1] *= 1e4
    plan = replan(profile, damage, bytes=0.5, codec="none", rule="damage").plan
    assert heads_of(plan)[1].share == 1
    assert plan.predicted_bytes <= 0.5
    for codec in ("none", "auto"):
        plan = planned(1.0, codec=codec)
        assert (plan.predicted_ratio, plan.predicted_bytes, plan.predicted_damage) == (1, 1, 0)


def test_no_share_lies_between_the_last_that_was_measured_and_all():
    for amount in np.arange(0.2, 1.0, 0.02):
        for head in heads_of(planned(float(amount))):
            assert head.share == 1 or head.share <= BUDGETS[-1] + 1e-9


def test_more_bytes_do_no_more_damage_and_bits_beat_slots_alone():
    plans = [planned(amount) for amount in AMOUNTS]
    found = [plan.predicted_damage for plan in plans]
    assert all(more <= less * 1.02 for less, more in itertools.pairwise(found))
    for amount in (0.15, 0.25, 0.5):
        both, alone = planned(amount), planned(amount, codec="none")
        assert {head.key_codec for head in heads_of(alone)} == {"none"}
        assert both.predicted_damage < 0.5 * alone.predicted_damage
        assert both.predicted_ratio > alone.predicted_ratio + 0.1
    assert found[-1] < 1e-3


@settings(PROPERTY, max_examples=15)
@given(seed=st.integers(0, 2**31), amount=st.floats(0.06, 0.6))
def test_no_pick_of_one_share_policy_and_codecs_for_all_is_better(seed, amount):
    """Against all ways to treat every head alike, by brute force; and against what the solver calls uniform."""
    plan, alike = (planned(amount, seed=seed, rule=rule) for rule in ("damage", "uniform"))
    profile, slots, arrays = coded_profile(), damage_of(seed).sum(-1) * 1e-2, codec_arrays(seed)
    sizes, least = Sizes(TOKENS, 64, 16), np.inf
    for name, keys, values in itertools.product(NAMES, ["none", *STORED], ["none", *STORED]):
        cost, extra = sizes.slot((keys, values)), sizes.apart((keys, values), 32)
        share = 1.0 if cost + extra <= amount else min((amount - extra) / cost, BUDGETS[-1])
        if share < 0.036:
            continue
        total = 0.0
        for row, column in itertools.product(range(2), range(2)):
            total += 0 if share == 1 else log_between(max(share, 0.1), BUDGETS, slots[row, NAMES.index(name), column])
            for codec, array in ((keys, "key_codec_damage"), (values, "value_codec_damage")):
                if codec != "none":
                    total += log_between(share, SHARES, arrays[array][row, 0, column, :, STORED.index(codec)].sum(-1))
        least = min(least, total)
    # A step of the grid, and what is lost to whole blocks.
    slack = planned(max(0.05, amount - 0.012), seed=seed).damage_bound
    assert plan.damage_bound <= least * 1.001
    assert plan.damage_bound <= plan.predicted_damage <= max(2 * slack, slack + 0.3 * least)
    assert len({(head.policy, head.share, head.key_codec, head.value_codec) for head in heads_of(alike)}) == 1
    assert alike.predicted_damage >= 0.98 * plan.damage_bound
    assert profile.statistics.damage.codecs == STORED


@pytest.mark.parametrize(
    ("codec", "keys", "values"),
    [("int8", "int8", "int8"), ("int8/int4", "int8", "int4"), ("none/int2", "none", "int2")],
)
def test_a_codec_that_is_asked_for_is_that_of_all(codec, keys, values):
    for choices in ({"amount": 0.3}, {"amount": 0.9}, {"budget": 0.4}, {"budget": 0.4, "rule": "uniform"}):
        plan = planned(codec=codec, **choices)
        assert plan.codec == codec
        assert {(head.key_codec, head.value_codec) for head in heads_of(plan)} == {(keys, values)}
        assert plan.predicted_codec_damage > 0
    assert planned(0.9, codec="int8").predicted_ratio == 1
    slots = planned(budget=0.4, codec="int8")
    assert (slots.bytes, slots.budget, slots.predicted_ratio) == (None, 0.4, 0.4)
    assert slots.predicted_bytes == pytest.approx(bytes_of(slots), abs=2e-6)


@pytest.mark.parametrize(
    ("choices", "error", "told"),
    [
        (
            {"amount": 0.01},
            MismatchError,
            r"bytes 0.01 is out of reach: the newest 32 tokens in 16 bits, .* in int2 .* take",
        ),
        (
            {"amount": 0.04, "codec": "none"},
            MismatchError,
            r"protected ones as they are .*; ask for bytes from 0\.04\d to 1",
        ),
        (
            {"amount": 0.3, "codec": "int3"},
            UsageError,
            r"no damage was measured for the codec 'int3'; expected none, auto",
        ),
        ({"amount": 0.3, "codec": "int8/turbo4"}, UsageError, "'turbo4'"),
        ({"budget": 0.3, "codec": "auto"}, UsageError, "it needs --bytes"),
        ({"amount": 0.3, "budget": 0.3}, UsageError, "both budget and bytes were given"),
        ({"amount": 1.5}, UsageError, "bytes 1.5 is not a fraction of the stock cache's bytes"),
        ({"amount": 0.3, "rule": "pyramidkv"}, UsageError, "the rule pyramidkv deals out slots; bytes are spent by"),
    ],
    ids=str,
)
def test_what_cannot_be_planned(choices, error, told):
    with pytest.raises(error, match=told) as caught:
        planned(**choices)
    assert "\n" not in str(caught.value)


def test_a_profile_without_codecs_says_so():
    profile, damage = damaged(), damage_of()
    with pytest.raises(UsageError, match=r"no codec's damage was measured, .*; calibrate anew, or give --codec none"):
        replan(profile, damage, bytes=0.3)
    plan = replan(profile, damage, bytes=0.3, codec="none").plan
    assert plan.predicted_bytes <= 0.3
    with pytest.raises(UsageError, match="lies in the arrays beside the profile"):
        replan(coded_profile(), damage, bytes=0.3)


def test_what_was_asked_for_stays_until_something_else_is():
    profile, damage, arrays = coded_profile(), damage_of(), codec_arrays()

    def again(before, *budget, **changes):
        return replan(before, damage, *budget, measured=arrays, **changes)

    small = again(profile, bytes=0.2)
    assert again(small).plan == small.plan
    assert again(small, policy="streaming").plan.bytes == 0.2
    eight = again(small, codec="int8")
    assert again(eight, bytes=0.3).plan.codec == "int8"
    slots = again(eight, 0.4)
    assert (slots.plan.bytes, slots.plan.codec) == (None, "none")
    assert again(slots, bytes=0.2).plan == small.plan
    assert Profile.model_validate_json(small.to_json()) == small


def test_a_slot_takes_what_it_is_stored_in():
    sizes = sizes_of(2048, 64)
    assert (sizes.block, sizes.stock) == (32, 256)
    assert sizes.slot(NOTHING) == (256 + 4 + 12 / 32) / 256
    assert sizes.slot(("int8", "int4")) == (68 + 36 + 2 + 12 / 32) / 256
    # 300 slots of which 32 are the newest tokens: 268 in 9 blocks of 32.
    facts = (4 * 64 + 4 * 32 + 16) / 256  # a mean of keys, attention received by the newest tokens, and lengths
    assert sizes.head(300 / 2048, ("int8", "int8"), 32) == pytest.approx(
        (288 * sizes.slot(("int8",) * 2) + 32 + facts) / 2048
    )


def test_a_plan_of_slots_says_its_bytes_too():
    plan = planned(budget=0.4)
    assert plan.bytes is None
    assert plan.predicted_bytes == pytest.approx(bytes_of(plan), abs=2e-6)
    assert 0.4 < plan.predicted_bytes < 0.43


@pytest.fixture(scope="module", name="in_bytes")
def _in_bytes(tiny_folder, tmp_path_factory):
    """A tiny model calibrated for bytes, and its profile."""
    path = tmp_path_factory.mktemp("bytes") / "profile.json"
    words = ("--bytes", "0.4", "--tokens", "512", "--samples", "2", "--held-out", "1", "--device", "cpu")
    result = run("calibrate", tiny_folder, *words, "-o", path)
    assert result.exit_code == 0, result.output
    return path, result


def test_calibrate_takes_bytes_and_checks_the_plan_as_it_is_stored(in_bytes):
    path, result = in_bytes
    profile = load_profile(path)
    plan, check = profile.plan, profile.check
    assert plan.bytes == 0.4
    assert plan.predicted_bytes <= 0.4
    assert check.exact.achieved.mean == pytest.approx(plan.predicted_ratio, abs=0.005)
    # In 32 bits: a smaller part of what is larger.
    assert 0.18 < check.bytes_ratio < 0.26
    assert "Asked to keep 40.0% of the bytes" in result.stderr
    uniform = replan(profile, profile.arrays()["damage_mean"], rule="uniform", measured=profile.arrays()).plan
    assert len({(head.policy, head.share, head.key_codec, head.value_codec) for head in heads_of(uniform)}) == 1
    assert uniform.predicted_bytes <= 0.4


@pytest.mark.parametrize("amount", [0.15, 0.25, 0.4, 0.6, 1.0])
def test_a_model_in_16_bits_holds_the_bytes_that_were_planned(amount, in_bytes, tiny_folder):
    profile = load_profile(in_bytes[0]).replan(bytes=amount, codec="auto")
    model = load_model(str(tiny_folder), dtype="bfloat16", device="cpu").model
    facts = model.config
    merger = KVMerger.from_profile(profile, arrays=load_profile(in_bytes[0]).arrays()).attach(model)
    with torch.inference_mode():
        cache = merger.cache()
        model(torch.arange(512)[None] % 60 + 1, past_key_values=cache)
    merger.detach()
    stock = 512 * facts.num_hidden_layers * facts.num_key_value_heads * facts.head_dim * 4
    assert cache.nbytes() / stock == pytest.approx(profile.plan.predicted_bytes, abs=0.02)
    assert cache.nbytes() / stock <= amount * 1.02


def test_the_commands_take_bytes(tiny_profile, tmp_path):
    path = tmp_path / "small.json"
    result = run("plan", tiny_profile, "--bytes", "40%", "-o", path)
    assert result.exit_code == 2
    assert "bytes 40% is not a fraction of the stock cache's bytes" in result.stderr
    result = run("plan", tiny_profile, "--bytes", "0.4", "--budget", "0.5", "-o", path)
    assert result.exit_code == 2
    assert "give one of them" in result.stderr
    result = run("plan", tiny_profile, "--bytes", "0.4", "-o", path)
    assert result.exit_code == 0, result.output
    told = re.search(
        r"The plan keeps ([\d.]+)% of the merged layers' slots and ([\d.]+)% of their bytes", result.stderr
    )
    assert float(told[1]) > 60
    assert 39 <= float(told[2]) <= 40
    assert "bytes 0.4, codec auto" in run("show", path).stdout
    assert run("report", path, "-o", tmp_path / "small.html").exit_code == 0
    assert "asked 40.0% of the bytes" in (tmp_path / "small.html").read_text()
    again = run("plan", path, "--codec", "int8", "-o", tmp_path / "eight.json", "--json")
    assert again.exit_code == 0, again.output
    assert '"key_codec": "int8"' in again.stdout
    result = run("calibrate", "nowhere", "--bytes", "0.4", "--budget", "0.5")
    assert result.exit_code == 2
