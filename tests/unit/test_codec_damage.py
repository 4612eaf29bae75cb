"""What codecs do: against plain attention in float64 over the slots as stored, and against the KL of all together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from kvprofile.calibration.calibrate import MEASURED_CODECS, codecs_for
from kvprofile.calibration.measure import codec_damage as module
from kvprofile.calibration.measure.codec_damage import SHARES, WORST, CodecDamage, codec_damage, stored
from kvprofile.calibration.measure.key_mean import KeyMean
from kvprofile.calibration.measure.probed import EVERY, Probed, some_of
from kvprofile.calibration.runs import coded
from kvprofile.codecs.table import CODECS
from kvprofile.errors import UsageError
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import POLICIES
from tests.unit.architectures import build
from tests.unit.test_damage import KINDS, exact, readings_of, tiny_probe
from tests.unit.tiny_models import tiny_model

NAMES = ["bfloat16", "int8", "int4", "int2", "fp8-e4m3", "turbo3"]
ALL = [CODECS[name] for name in NAMES]


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


@pytest.fixture(name="readings", scope="module")
def _readings():
    return readings_of(tiny_model(), tiny_probe())


def direct(reading, name, share, codec):
    """Damage `(2, kv_heads, kinds)` of a codec of keys, and of values, on the slots of a policy: head by head, float64."""
    policy, context, call = POLICIES[name], reading.context, reading.call
    tokens, kv_heads = context.keys.shape[2], call.key.shape[1]
    recent, queries, group = (
        policy.protection.recent_tokens(tokens),
        call.query.shape[2],
        call.query.shape[1] // kv_heads,
    )
    if share == 1:
        pieces = [
            (context.keys[0, one, :-recent], context.values[0, one, :-recent], torch.zeros(tokens - recent))
            for one in (0, 1)
        ]
    else:
        count = torch.full((1, kv_heads), max(5, round(share * tokens) - recent))
        heavy = policy.protection.heavy_tokens(tokens)
        slots = merge_tokens(context.oldest(tokens - recent), policy, count=count, heavy=heavy)
        pieces = list(zip(*(part.split(slots.lengths) for part in (slots.keys, slots.values, slots.bias)), strict=True))
    future = np.triu(np.ones((queries, queries), dtype=bool), 1)
    result = np.zeros((2, kv_heads, len(KINDS)))
    for head, (old_keys, old_values, bias) in enumerate(pieces):
        mean = context.keys[0, head].mean(0)

        def output(one, keys, values, head=head, bias=bias):
            later = slice(tokens - recent, None)
            keys, values = (
                np.concatenate([exact(part), exact(old[0, head, later]), exact(own[0, head])])
                for part, old, own in ((keys, context.keys, call.key), (values, context.values, call.value))
            )
            logits = exact(call.query[0, one]) @ keys.T * call.softmax.scaling
            logits[:, : len(bias)] += exact(bias)
            logits[:, -queries:][future] = -np.inf
            return softmax(logits, axis=-1) @ values

        kept = (stored(codec, old_keys.float(), mean), old_values), (old_keys, stored(codec, old_values.float()))
        for place, (keys, values) in enumerate(kept):
            slopes = np.zeros(reading.gradients.shape[:2])
            for one in range(head * group, (head + 1) * group):
                change = output(one, keys, values) - output(one, old_keys, old_values)
                slopes += (exact(reading.gradients[:, :, one]) * change).sum(-1)
            for kind in range(len(KINDS)):
                own = reading.few.numpy()[reading.kind.numpy()[reading.few.numpy()] == kind]
                result[place, head, kind] = (slopes[:, own] ** 2).mean() / 2
    return result


@pytest.mark.parametrize("name", ["gather-mended", "attention", "value-attention", "h2o"])
def test_what_a_codec_does_is_that_of_plain_attention_over_what_is_stored(readings, name):
    for reading in readings.values():
        found = codec_damage(reading, [POLICIES["streaming"], POLICIES[name]], KINDS, ALL)[:, 1]
        assert found.shape == (2, 2, len(SHARES), len(ALL), len(KINDS))
        for place, share in enumerate(SHARES[1:], 1):
            expected = np.stack([direct(reading, name, share, codec) for codec in ALL], axis=2)
            np.testing.assert_allclose(found[:, :, place], expected, rtol=5e-3, atol=1e-10)
    # Fewer bits, more harm.
    eight, four, two = (found[:, :, :, NAMES.index(codec)].sum() for codec in ("int8", "int4", "int2"))
    assert 20 * eight < four < two / 3


def test_with_every_token_kept_policies_do_not_differ_and_16_bits_of_16_bits_are_exact(readings):
    found = codec_damage(readings[0], [POLICIES["gather-mended"], POLICIES["snapkv-128"]], KINDS, ALL)
    np.testing.assert_array_equal(found[:, 0, :, -1], found[:, 1, :, -1])
    half = readings_of(tiny_model().bfloat16(), tiny_probe())[0]
    kept = codec_damage(half, [POLICIES["h2o"]], KINDS, [CODECS["bfloat16"], CODECS["int8"]])
    assert (kept[..., 0, :] < 1e-12).all()
    assert (kept[..., 1, :] > 0).all()


FULL = {"layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_model("gemma2", attention="eager", **FULL),  # soft caps
        lambda: build("GPT-OSS", **FULL),  # sinks
        lambda: build("Qwen2", hidden_size=112, num_attention_heads=14),  # seven query heads a KV head
    ],
    ids=["Gemma2", "GPT-OSS", "Qwen2"],
)
def test_every_attention_is_followed(model):
    reading = readings_of(model(), tiny_probe())[1]
    policies = [POLICIES[one] for one in ("gather-mended", "value-attention")]
    whole = codec_damage(reading, policies, KINDS, ALL)
    assert (whole > 0).all()
    assert np.isfinite(whole).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvprofile.calibration.measure.probed.PART_BYTES", 1)
        np.testing.assert_allclose(codec_damage(reading, policies, KINDS, ALL), whole, rtol=1e-3, atol=1e-12)


def test_keys_that_a_codec_has_no_number_for_are_as_bad_as_can_be(readings):
    reading = readings[0]
    keys = reading.context.keys.clone()
    keys[0, 0, 5] = 1e6  # float16 ends at 65,504
    wild = replace(reading, context=replace(reading.context, keys=keys))
    found = codec_damage(wild, [POLICIES["h2o"]], KINDS, [CODECS["float16"], CODECS["int8"]])
    assert (found[0, 0, 0, -1, 0] == WORST).all()
    assert (found[:, 0, 1] < WORST).all()
    assert np.isfinite(found).all()


def test_damages_of_keys_of_values_and_of_merging_add_up_to_what_all_do_together(readings):
    """Over heads, policies and layers: where slots are merged and both are stored in few bits at once."""
    ratios = []
    for reading in readings.values():
        few = reading.thinned()
        for name in ("gather-mended", "attention"):
            policy, codec = POLICIES[name], CODECS["int4"]
            probe = Probed(few, [0, 1])
            context, recent, heavy = probe.split(policy)
            tokens = context.keys.shape[2] + recent
            count = torch.full((1, probe.kv_heads), round(0.3 * tokens) - recent)
            slots = merge_tokens(context, policy, count=count, heavy=heavy)
            keys, values, bias = module.padded(slots)
            mean = reading.context.keys[0].mean(1, keepdim=True)
            above, below = probe.recent(tokens - recent)
            together = probe.over(stored(codec, keys, mean), stored(codec, values), bias)
            joint = probe.damage(above + together[0], below + together[1])
            own = probe.over(keys, values, bias)
            slots_alone = probe.damage(above + own[0], below + own[1])
            coded_ = codec_damage(reading, [policy], KINDS, [codec])[:, 0, :, 1, 0].sum(0)
            ratios.append(float((slots_alone.numpy() + coded_).sum() / joint.numpy().sum()))
    assert np.mean(ratios) == pytest.approx(1, abs=0.25)


# Which queries, which policy, which codecs.


def test_few_queries_are_of_every_kind_that_counts():
    kind = torch.tensor([1] * 7 + [-1] * 5 + [0] * 9 + [3] + [-1])
    chosen = some_of(kind)
    assert chosen.tolist() == sorted(chosen.tolist())
    counted = kind[chosen]
    assert [int((counted == one).sum()) for one in (-1, 0, 1, 2, 3)] == [0, -(-9 // EVERY), -(-7 // EVERY), 0, 1]


def test_codecs_are_measured_on_the_slots_of_the_policy_that_mends_or_merges():
    def first(*names):
        return coded([(name, POLICIES[name]) for name in names])[0][0]

    assert first("h2o", "attention", "gather-mended") == "gather-mended"
    assert first("h2o", "attention") == "attention"
    assert first("h2o") == "h2o"


def test_which_codecs_are_measured():
    assert codecs_for("auto", ["gauss"]) == MEASURED_CODECS
    assert codecs_for("none", ["gauss"]) == codecs_for("auto", []) == ()
    assert codecs_for("fp8-e4m3,int8,int8", ["gauss"]) == ("fp8-e4m3", "int8")
    for name in ("int5", "int8,none", "", "INT8"):
        with pytest.raises(UsageError, match=r"unknown codec .*; expected auto, none, or names separated by commas of"):
            codecs_for(name, ["gauss"])


# The accumulators.


def test_samples_are_averaged_and_merged_in_order(readings):
    policies = [("h2o", POLICIES["h2o"])]

    def empty():
        return CodecDamage(2, 2, policies, KINDS, ["int8", "int4"])

    whole, first, second = empty(), empty(), empty()
    for part in (first, second):
        for layer, reading in readings.items():
            whole.update(layer, reading)
            part.update(layer, reading)
    first.merge(second)
    found = whole.finish()
    for name, array in first.finish().items():
        assert array.shape == (2, 1, 2, len(SHARES), 2, len(KINDS))
        assert array.tobytes() == found[name].tobytes()
    one = codec_damage(readings[1], [POLICIES["h2o"]], KINDS, [CODECS["int8"], CODECS["int4"]])
    np.testing.assert_allclose(found["key_codec_damage"][1], one[0], rtol=1e-6)
    np.testing.assert_allclose(found["value_codec_damage"][1], one[1], rtol=1e-6)


def test_the_mean_key_is_that_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 40, 8, generator=generator)
    found = KeyMean(4, 2, 8)
    for sample in keys:
        found.update(1, sample)
        found.update(2, sample.repeat(1, 1, 2))  # another dimension: left out
    mean = found.finish()["key_mean"]
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean[1], keys.mean((0, 2)), rtol=1e-5, atol=1e-7)
    assert not mean[[0, 2, 3]].any()
