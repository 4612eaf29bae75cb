"""Damage: against plain attention in float64 over what the runtime would hold, and against the KL it predicts."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from transformers import DynamicCache

from kvprofile import KVMerger
from kvprofile.calibration import sensitivity
from kvprofile.calibration.measure import damage as module
from kvprofile.calibration.measure import probed
from kvprofile.calibration.measure.damage import BUDGETS, MANY, DamageCurves, damage
from kvprofile.calibration.measure.probed import Reading
from kvprofile.calibration.observe import observing
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.probes import Probe, make_probe
from kvprofile.calibration.sensitivity import DRAWS, _gradients, read_probe
from kvprofile.errors import KVProfileError
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.sets import SET_RULES
from tests.unit.architectures import build
from tests.unit.merge_reference import relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

CONTEXT = 240
DROPS = [name for name in POLICIES if POLICIES[name].rule == "drop"]
MERGES = ["gauss", "attention", "absorb", "average", "pivot", "cam", "d2o", "keepkv", "zsmerge"]
# Where protected tokens, 36 of 240, leave something to choose.
CHOSEN = [place for place, budget in enumerate(BUDGETS) if budget * CONTEXT >= 36]

MIX = ProbeMix()
KINDS = MIX.kinds  # recall and continuation: kind 0 and 1


@pytest.fixture(autouse=True)
def _no_graph():
    """Readings are used where they are handed over, without a graph."""
    with torch.no_grad():
        yield


def exact(part: torch.Tensor) -> np.ndarray:
    return part.detach().double().numpy()


def tiny_probe(seed: int = 0) -> Probe:
    text = tiny_text(CONTEXT + 80, seed=seed)[0]
    return make_probe(text[:CONTEXT], text[CONTEXT:], seed)


def readings_of(model, probe: Probe, *, seed: int = 0) -> dict[int, Reading]:
    found: dict[int, Reading] = {}
    layers = list(range(model.config.num_hidden_layers))
    with torch.enable_grad(), observing(model) as observer:
        read_probe(observer, probe, lambda *_: None, found.__setitem__, layers=layers, seed=seed)
    assert list(found) == layers
    return found


@pytest.fixture(name="readings", scope="module")
def _readings() -> dict[int, Reading]:
    return readings_of(tiny_model(), tiny_probe())


def direct(reading: Reading, name: str, budget: float, floor: int = 0) -> np.ndarray:
    """Damage `(kv_heads, kinds)` at one budget: the slots the runtime would hold, one softmax, float64."""
    policy, context, call = POLICIES[name], reading.context, reading.call
    counted = reading.few.numpy() if budget > MANY and not policy.only_drops else np.arange(len(reading.kind))
    tokens = context.keys.shape[2]
    recent = policy.protection.recent_tokens(tokens)
    kv_heads, group = call.key.shape[1], call.query.shape[1] // call.key.shape[1]
    # As in the runtime: the 4 first tokens, and one slot more where neighbours merge.
    least = 5 if POLICIES[name].rule in SET_RULES else floor
    count = torch.full((1, kv_heads), max(least, round(budget * tokens) - recent))
    heavy = policy.protection.heavy_tokens(tokens)
    slots = merge_tokens(context.oldest(tokens - recent), policy, count=count, heavy=heavy)
    pieces = list(zip(*(part.split(slots.lengths) for part in (slots.keys, slots.values, slots.bias)), strict=True))
    queries = call.query.shape[2]
    future = np.triu(np.ones((queries, queries), dtype=bool), 1)
    result = np.zeros((kv_heads, len(KINDS)))
    for kv_head, (old_keys, old_values, old_bias) in enumerate(pieces):
        later = slice(tokens - recent, None)
        all_keys, all_values = (
            torch.cat([old[0, kv_head], own[0, kv_head]])
            for old, own in ((context.keys, call.key), (context.values, call.value))
        )
        keys = exact(torch.cat([old_keys, all_keys[later]]))
        values = exact(torch.cat([old_values, all_values[later]]))
        slopes = np.zeros(reading.gradients.shape[:2])
        for one in range(kv_head * group, (kv_head + 1) * group):
            logits = exact(call.query[0, one]) @ keys.T * call.softmax.scaling
            logits[:, : len(old_keys)] += exact(old_bias)
            logits[:, -queries:][future] = -np.inf
            whole = exact(call.query[0, one]) @ exact(all_keys).T * call.softmax.scaling
            whole[:, -queries:][future] = -np.inf
            unmerged = softmax(whole, axis=-1) @ exact(all_values)
            change = softmax(logits, axis=-1) @ values - unmerged
            slopes += (exact(reading.gradients[:, :, one]) * change).sum(-1)
        for kind in range(len(KINDS)):
            own = counted[reading.kind.numpy()[counted] == kind]
            result[kv_head, kind] = (slopes[:, own] ** 2).mean() / 2
    return result


@pytest.mark.parametrize("name", DROPS + MERGES)
def test_damage_is_that_of_plain_attention_over_the_slots(readings, name):
    for reading in readings.values():
        found = damage(reading, [POLICIES["streaming"], POLICIES[name]], KINDS)[1]
        assert found.shape == (2, len(BUDGETS), len(KINDS))
        expected = np.stack([direct(reading, name, BUDGETS[place]) for place in CHOSEN], axis=1)
        np.testing.assert_allclose(found[:, CHOSEN], expected, rtol=2e-3, atol=1e-9)
        assert (expected[:, 0] > 2 * expected[:, -1]).all()


@pytest.mark.parametrize("name", ["streaming", "gauss"])
def test_below_the_floor_protected_tokens_are_kept_as_the_runtime_keeps_them(readings, name):
    # 2% of 240 are 5 tokens: the 4 first and the 32 recent ones keep their slots all the same.
    found = damage(readings[0], [POLICIES[name]], KINDS)[0]
    np.testing.assert_allclose(found[:, 0], direct(readings[0], name, BUDGETS[0], floor=1), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT-OSS"])
def test_heads_taken_in_parts_are_what_they_are_together(monkeypatch, name):
    changes = {"Llama": {}, "Qwen2": {"hidden_size": 112, "num_attention_heads": 14}}
    model = build(name, **changes.get(name, {"layer_types": ["full_attention"] * 2}))
    reading = readings_of(model, tiny_probe())[1]
    policies = [POLICIES[one] for one in ("value-attention", "gather-mended", "random")]
    expected = damage(reading, policies, KINDS)
    monkeypatch.setattr(probed, "PART_BYTES", 1)
    assert len(list(reading.parts())) == reading.call.key.shape[1] == 2
    np.testing.assert_allclose(damage(reading, policies, KINDS), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in DROPS + MERGES if not POLICIES[name].only_drops])
def test_budgets_merged_together_are_what_they_are_one_by_one(monkeypatch, readings, name):
    expected = damage(readings[1], [POLICIES[name]], KINDS)
    monkeypatch.setattr(module, "together", lambda counts, _part: filter(None, [counts[:5], counts[5:]]))
    np.testing.assert_allclose(damage(readings[1], [POLICIES[name]], KINDS), expected, rtol=1e-4, atol=1e-12)


def test_soft_caps_are_followed():
    model = tiny_model("gemma2", attention="eager", layer_types=["full_attention"] * 2)
    reading = readings_of(model, tiny_probe())[0]
    assert reading.call.softmax.softcap == 4.0
    # At the full budget nothing may change; without the cap everything would.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUDGETS", (0.5, 1.0))
        found = damage(reading, [POLICIES["gauss"], POLICIES["value-attention"]], KINDS)
    assert (found[:, :, 1] < 1e-6 * found[:, :, 0]).all()


@pytest.mark.parametrize("name", DROPS + MERGES)
def test_with_all_slots_nothing_changes(monkeypatch, readings, name):
    monkeypatch.setattr(module, "BUDGETS", (0.5, 1.0))
    for reading in readings.values():
        found = damage(reading, [POLICIES[name]], KINDS)[0]
        assert (found[:, 1] < 1e-8 * found[:, 0]).all()


def test_gradients_are_the_slope_of_the_drawn_tokens_log_probability(monkeypatch):
    model, probe = tiny_model(), tiny_probe()
    drawn = []
    multinomial = torch.multinomial

    def remembered(*arguments, **options):
        drawn.append(multinomial(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", remembered)
    readings = readings_of(model, probe)
    (tokens,) = drawn
    assert tokens.shape == (len(probe.tokens), DRAWS)
    precise = tiny_model().double()
    text = torch.cat([probe.context, probe.tokens])[None]

    @torch.no_grad()
    def log_probability(layer: int, nudge: torch.Tensor) -> torch.Tensor:
        """Of every draw, summed over the probe, with something added to the layer's attention output."""

        def add(_module, arguments):
            changed = arguments[0].clone()
            changed[0, CONTEXT:] += nudge.flatten(1)
            return (changed,)

        hook = precise.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(add)
        rows = torch.log_softmax(precise(text).logits[0, CONTEXT:], dim=-1)
        hook.remove()
        return rows.gather(1, tokens).sum(0)

    generator = torch.Generator().manual_seed(5)
    for layer, reading in readings.items():
        assert reading.gradients.shape == (DRAWS, len(probe.tokens), 4, 16)
        direction = torch.randn(reading.gradients.shape[1:], generator=generator, dtype=torch.float64)
        direction[:, 2:] *= 3  # heads are told apart
        step = 1e-3  # norms are computed in single precision even in a double model
        measured = (log_probability(layer, step * direction) - log_probability(layer, -step * direction)) / (2 * step)
        expected = (reading.gradients.double() * direction).sum((1, 2, 3))
        assert relative_error(measured, expected) < 2e-4
        assert expected.abs().min() > 0.1


def test_draws_are_the_seeds():
    model, probe = tiny_model(), tiny_probe()
    first, again, other = (readings_of(model, probe, seed=seed)[1].gradients for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("slope", "least"), [(3.0, 2.0**12), (2.0**9, 2.0**6), (2.0**14, 1.0)])
def test_gradients_in_float16_are_scaled_as_far_as_its_range_allows(slope, least):
    outputs = torch.zeros(5, 9, dtype=torch.float16, requires_grad=True)
    with torch.enable_grad():
        logits = outputs * slope
    found, scale = _gradients(logits, [outputs], 0)
    assert (scale, len(found)) == (least, DRAWS)
    for (one,) in found:
        # At equal logits: 8 / 9 for the drawn token, -1 / 9 for the others.
        part = (one.float() / scale / slope).sort(-1).values
        torch.testing.assert_close(part, torch.tensor([-1 / 9] * 8 + [8 / 9]).expand(5, -1), rtol=2e-3, atol=0)


def test_small_gradients_survive_float16():
    outputs = torch.zeros(5, 9, dtype=torch.float16, requires_grad=True)
    with torch.enable_grad():
        logits = outputs * 2.0**-11 * 2.0**-11
    found, scale = _gradients(logits, [outputs], 0)
    assert found[0][0].amax().item() / scale == pytest.approx(8 / 9 * 2**-22, rel=1e-2)


def test_gradients_that_are_not_finite_are_refused():
    outputs = torch.zeros(5, 9, dtype=torch.float16, requires_grad=True)
    with torch.enable_grad():
        logits = (outputs * 30000) * 30000
    with pytest.raises(KVProfileError, match=r"no finite gradients in float16; calibrate with another --dtype"):
        _gradients(logits, [outputs], 0)


def test_a_caller_that_wants_no_gradients_gets_the_same_readings(readings):
    found: dict[int, Reading] = {}
    with torch.no_grad(), observing(tiny_model()) as observer:
        read_probe(observer, tiny_probe(), lambda *_: None, found.__setitem__, layers=[0, 1], seed=0)
    for layer, reading in readings.items():
        assert torch.equal(found[layer].gradients, reading.gradients)


def test_a_reading_is_what_the_model_attended_to():
    model, probe = tiny_model(), tiny_probe()
    called = []
    with torch.enable_grad(), observing(model) as observer:
        found = {}
        read_probe(
            observer,
            probe,
            lambda layer, call, _mass: called.append((layer, call.key.shape[2], call.query.shape[2])),
            found.__setitem__,
            layers=[1],
            seed=0,
        )
    assert called == [(0, CONTEXT, CONTEXT), (1, CONTEXT, CONTEXT)]
    assert list(found) == [1]
    reading, tokens = found[1], len(probe.tokens)
    stock = DynamicCache()
    with torch.no_grad():
        model(torch.cat([probe.context, probe.tokens])[None], past_key_values=stock)
    for old, own, whole in (
        (reading.context.keys, reading.call.key, stock.layers[1].keys),
        (reading.context.values, reading.call.value, stock.layers[1].values),
    ):
        assert old.shape[2] == CONTEXT
        assert relative_error(torch.cat([old, own], dim=2), whole) < 1e-5
    assert (reading.context.position, reading.context.seen) == (0, CONTEXT)
    assert reading.gradients.shape == (DRAWS, tokens, 4, 16)
    # The context's scores know nothing of the probe: 240 queries of two heads hand out one each.
    torch.testing.assert_close(reading.context.mass.sum(-1), torch.full((1, 2), 2.0 * CONTEXT))
    assert {size: part.shape for size, part in reading.context.windows.items()} == {
        32: (1, 2, CONTEXT),
        128: (1, 2, CONTEXT),
    }
    assert not any(part.requires_grad for part in (reading.gradients, reading.context.mass))


@pytest.mark.parametrize("name", ["absorb", "value-attention"])
def test_predicted_damage_is_near_the_true_divergence(monkeypatch, name):
    monkeypatch.setattr(sensitivity, "DRAWS", 64)
    share = 0.7
    monkeypatch.setattr(module, "BUDGETS", (share,))
    model = tiny_model(num_hidden_layers=3, num_key_value_heads=4)
    probe = tiny_probe()
    weight = np.bincount(probe.kind.numpy()) / len(probe.kind)
    readings = readings_of(model, probe)
    predicted = np.array([damage(reading, [POLICIES[name]], KINDS)[0, :, 0] @ weight for reading in readings.values()])

    def rows(cache) -> np.ndarray:
        with torch.no_grad():
            model(probe.context[None], past_key_values=cache, logits_to_keep=1)
            logits = model(probe.tokens[None], past_key_values=cache).logits[0]
        return log_softmax(logits.double().numpy(), axis=-1)

    reference = rows(DynamicCache(config=model.config))
    true = np.zeros_like(predicted)
    for layer, one in np.ndindex(*predicted.shape):
        plans = {row: [head(name) for _ in range(4)] for row in range(3)}
        plans[layer][one] = head(name, share=share)
        merger = KVMerger.from_profile(profile_values(model, plans)).attach(model)
        merged = rows(merger.cache())
        merger.detach()
        true[layer, one] = (np.exp(reference) * (reference - merged)).sum(-1).mean()
    assert (true > 0).all()
    assert np.corrcoef(predicted.ravel(), true.ravel())[0, 1] > 0.9
    ratio = predicted / true
    assert 0.5 < np.exp(np.log(ratio).mean()) < 2
    assert ((ratio > 0.2) & (ratio < 5)).all()


# Accumulating.


def test_curves_are_the_mean_and_spread_over_samples_however_they_are_split():
    model = tiny_model()
    policies = [(name, POLICIES[name]) for name in ("absorb", "streaming")]
    readings = [readings_of(model, tiny_probe(seed), seed=seed) for seed in range(3)]
    whole, first, second = (DamageCurves(2, 2, policies, KINDS) for _ in range(3))
    for sample, layers in enumerate(readings):
        for layer, reading in layers.items():
            whole.update(layer, reading)
            (first if sample == 1 else second).update(layer, reading)
    first.merge(second)
    values = np.array(
        [[damage(layers[layer], [one for _, one in policies], KINDS) for layer in (0, 1)] for layers in readings]
    )
    assert values.shape == (3, 2, 2, 2, len(BUDGETS), len(KINDS))
    for found in (whole.finish(), first.finish()):
        np.testing.assert_allclose(found["damage_mean"], values.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found["damage_std"], values.std(axis=0, ddof=1), rtol=1e-4, atol=1e-12)
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


# Probes.


@pytest.mark.parametrize("tokens", [2048, 320, 321, 100, 16])
@pytest.mark.parametrize("seed", range(4))
def test_probes_repeat_a_passage_of_every_stretch(tokens, seed):
    context, following = torch.arange(tokens) * 7, -1 - torch.arange(200)
    probe = make_probe(context, following, seed)
    assert torch.equal(probe.context, context)
    assert torch.equal(probe.tokens[: MIX.continuation_tokens], following[: MIX.continuation_tokens])
    assert [KINDS[kind] for kind in probe.kind] == ["continuation"] * MIX.continuation_tokens + ["recall"] * (
        len(probe.tokens) - MIX.continuation_tokens
    )
    stretch = tokens // MIX.passages
    length = min(MIX.passage_tokens, stretch)
    passages = (probe.tokens[MIX.continuation_tokens :] // 7).view(MIX.passages, length)
    assert (passages.diff(dim=1) == 1).all()
    starts = passages[:, 0].tolist()
    assert sorted(start // stretch for start in starts) == list(range(MIX.passages))
    assert all(start % stretch + length <= stretch for start in starts)
    assert starts != sorted(starts)
    assert torch.equal(make_probe(context, following, seed).tokens, probe.tokens)
    assert len({tuple(make_probe(context, following, other).tokens.tolist()) for other in range(9)}) == 9


def test_a_short_continuation_is_taken_whole():
    probe = make_probe(torch.arange(320), torch.arange(9), 0)
    assert probe.kind.tolist() == [1] * 9 + [0] * (MIX.passages * MIX.passage_tokens)
