"""Plans for bytes of models with sliding layers: what is kept, what is said of it, and that little better could be done."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile import KVMerger, load_model, load_profile
from kvprofile.codecs.table import CODECS
from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.planning.plans import make_plan
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import LayerPlan
from tests.unit import test_bytes_plans
from tests.unit.conftest import run, save_tiny_model
from tests.unit.reference import PROPERTY
from tests.unit.test_bytes_plans import STORED, bytes_of, codec_arrays, coded_profile
from tests.unit.test_plans import TOKENS, damage_of, heads_of

WINDOW, DIM, HELD = 301, 64, 300
SLIDING = [0, 2, 3]
CODES = ["none", *STORED]


def windowed(measured=True) -> Profile:
    """Two full-attention layers and three sliding ones, of two KV heads each."""
    values = coded_profile().model_dump()
    values["model"] |= {
        "layers": 5,
        "attention": ["full_attention" if layer in (1, 4) else "sliding_attention" for layer in range(5)],
        "window": WINDOW,
    }
    first = values["statistics"]["layers"][0]
    values["statistics"]["layers"] = [{**first, "layer": layer} for layer in range(5)]
    values["statistics"]["damage"]["windows"] = SLIDING if measured else []
    values["plan"]["layers"] = [
        LayerPlan.model_validate({**entry, "layer": layer}).model_dump()
        for layer, entry in zip((1, 4), values["plan"]["layers"], strict=True)
    ]
    return Profile.model_validate(values)


def arrays_of(seed):
    generator = np.random.default_rng(seed + 99)
    each = np.array([1.0, 250.0, 4000.0])[:, None]
    keys, values = (1e-5 * each * 10 ** generator.uniform(-1, 1, (3, 2, len(STORED), 2)) for _ in range(2))
    return codec_arrays(seed) | {"key_window_damage": keys, "value_window_damage": values / 10}


def planned(amount=None, *, seed=0, profile=None, **choices):
    return test_bytes_plans.planned(
        amount, seed=seed, profile=profile or windowed(), measured=arrays_of(seed), **choices
    )


def window_bytes(keys, values):
    """Of a head of a sliding layer: 268 tokens as stored, the newest 32 and the keys' mean."""
    if keys == values == "none":
        return HELD * DIM * 4
    codes = CODECS[keys].nbytes(DIM) + CODECS[values].nbytes(DIM)
    return 268 * codes + 32 * DIM * 4 + (0 if keys == "none" else 4 * DIM)


def pairs_of(plan):
    """Codecs of every head of the sliding layers."""
    own = {entry.layer: [(head.key_codec, head.value_codec) for head in entry.heads] for entry in plan.windows}
    return [pair for layer in SLIDING for pair in own.get(layer, [("none", "none")] * 2)]


def whole_bytes(plan):
    stock = 4 * TOKENS * DIM * 4 + 6 * HELD * DIM * 4
    return (bytes_of(plan) * 4 * TOKENS * DIM * 4 + sum(itertools.starmap(window_bytes, pairs_of(plan)))) / stock


AMOUNTS = [0.11, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_the_bytes_of_all_layers_are_met_from_below_and_said(amount, granularity):
    plan = planned(amount, granularity=granularity)
    assert plan.predicted_bytes == pytest.approx(whole_bytes(plan), abs=2e-6)
    assert plan.predicted_bytes <= amount
    assert plan.predicted_bytes > min(amount, 0.55) - (0.02 if granularity == "head" else 0.06)
    if granularity == "layer":
        assert all(len({head.key_codec + head.value_codec for head in entry.heads}) == 1 for entry in plan.windows)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_damage_is_that_of_heads_and_windows(amount):
    plan, arrays = planned(amount), arrays_of(0)
    for entry in plan.windows:
        for place, head in enumerate(entry.heads):
            expected = 0.0
            for codec, name in ((head.key_codec, "key_window_damage"), (head.value_codec, "value_window_damage")):
                if codec != "none":
                    expected += arrays[name][SLIDING.index(entry.layer), place, STORED.index(codec)].sum()
            assert head.damage == pytest.approx(expected, rel=1e-3)
    windows = sum(head.damage for entry in plan.windows for head in entry.heads)
    assert plan.predicted_damage == pytest.approx(sum(head.damage for head in heads_of(plan)) + windows, rel=2e-3)
    codecs = sum(head.codec_damage for head in heads_of(plan))
    assert plan.predicted_codec_damage == pytest.approx(codecs + windows, rel=2e-3, abs=1e-12)
    assert plan.damage_bound <= plan.predicted_damage


@settings(PROPERTY, max_examples=20)
@given(seed=st.integers(0, 2**31), amount=st.floats(0.11, 0.6))
def test_no_exchange_of_one_head_s_codecs_for_fewer_bytes_and_less_damage_is_left(seed, amount):
    """A window's head has a dozen pairs: none that takes no more bytes does less damage than the one it got."""
    plan, arrays = planned(amount, seed=seed), arrays_of(seed)

    def damage(place, pair):
        return sum(
            arrays[name][place // 2, place % 2, STORED.index(codec)].sum() if codec != "none" else 0.0
            for codec, name in zip(pair, ("key_window_damage", "value_window_damage"), strict=True)
        )

    for place, own in enumerate(pairs_of(plan)):
        for pair in itertools.product(CODES, CODES):
            if window_bytes(*pair) <= window_bytes(*own):
                assert damage(place, own) <= damage(place, pair) * (1 + 1e-9)


def test_windows_are_packed_where_that_is_cheaper_than_losing_slots():
    few, many = planned(0.2), planned(0.9)
    assert len(few.windows) == 3
    assert few.predicted_ratio > planned(0.2, profile=windowed(measured=False)).predicted_ratio - 0.2
    assert few.predicted_damage < planned(0.2, rule="uniform").predicted_damage
    assert planned(1.0).windows == []
    assert many.predicted_damage < few.predicted_damage


def test_alike_means_the_same_codecs_everywhere():
    for amount in (0.12, 0.25, 0.5):
        plan = planned(amount, rule="uniform")
        pairs = {(head.key_codec, head.value_codec) for head in heads_of(plan)}
        assert len(pairs) == 1
        assert set(pairs_of(plan)) == pairs
        assert plan.predicted_bytes <= amount
        assert plan.predicted_bytes == pytest.approx(whole_bytes(plan), abs=2e-6)


def test_a_codec_that_is_asked_for_is_that_of_the_windows_too():
    for choices in ({"amount": 0.3}, {"budget": 0.4}, {"budget": 0.4, "rule": "uniform"}):
        plan = planned(codec="int8/int4", **choices)
        assert set(pairs_of(plan)) == {("int8", "int4")}
        assert plan.predicted_bytes == pytest.approx(whole_bytes(plan), abs=2e-6)
    for choices in ({"amount": 0.5, "codec": "none"}, {"budget": 0.4}):
        plan = planned(**choices)
        assert plan.windows == []
        assert plan.predicted_bytes == pytest.approx(whole_bytes(plan), abs=2e-6)


def test_what_cannot_be_planned_is_told():
    with pytest.raises(MismatchError, match=r"bytes 0\.02 is out of reach"):
        planned(0.02)
    # 6 x 300 tokens of 5,800 stay as they are.
    with pytest.raises(MismatchError, match=r"ask for bytes from 0\.3[3-6]\d to 1"):
        planned(0.3, codec="none")
    profile = windowed()
    with pytest.raises(UsageError, match="lies in the arrays"):
        make_plan(
            profile.model,
            profile.policies,
            profile.statistics,
            damage_of() * 1e-2,
            bytes=0.4,
            tokens=TOKENS,
            measured=codec_arrays(),
        )


def test_without_windows_measured_the_fraction_is_of_the_merged_layers():
    plan = planned(0.3, profile=windowed(measured=False))
    assert plan.windows == []
    assert plan.predicted_bytes == pytest.approx(bytes_of(plan), abs=2e-6)


@pytest.fixture(scope="module", name="calibrated")
def _calibrated(tmp_path_factory):
    """A tiny Gemma 3 and its profile for bytes, through the command line."""
    folder = tmp_path_factory.mktemp("window")
    model = save_tiny_model(
        folder / "model",
        name="gemma3",
        sliding_window=200,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    words = ("--bytes", "0.4", "--tokens", "512", "--samples", "2", "--held-out", "1", "--device", "cpu")
    result = run("calibrate", model, *words, "-o", folder / "profile.json")
    assert result.exit_code == 0, result.output
    return model, folder / "profile.json"


def test_calibrate_measures_and_packs_the_windows(calibrated):
    profile = load_profile(calibrated[1])
    assert profile.statistics.damage.windows == [0, 2, 3]
    arrays = profile.arrays()
    assert arrays["key_window_damage"].shape == (3, 2, 5, 2)
    assert (arrays["key_window_damage"] > 0).all()
    assert profile.plan.windows
    assert profile.plan.predicted_bytes <= 0.4
    del arrays["key_window_damage"]
    from kvprofile.profile.measured_arrays import check_arrays

    with pytest.raises(KVProfileError, match="holds no key_window_damage"):
        check_arrays(profile, arrays, calibrated[1])


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.8])
def test_a_model_in_16_bits_holds_the_bytes_that_were_planned(amount, calibrated):
    profile = load_profile(calibrated[1]).replan(bytes=amount, codec="auto")
    model = load_model(str(calibrated[0]), dtype="bfloat16", device="cpu").model
    merger = KVMerger.from_profile(profile).attach(model)
    with torch.inference_mode():
        cache = merger.cache()
        model(torch.arange(512)[None] % 60 + 1, past_key_values=cache)
    merger.detach()
    stock = (512 + 3 * 199) * 2 * 16 * 4
    assert cache.nbytes() / stock == pytest.approx(profile.plan.predicted_bytes, abs=0.02)
    assert cache.nbytes() / stock <= amount * 1.02
