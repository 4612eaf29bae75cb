"""Slots stored by codecs, against a float64 model of the whole text in which every new slot is encoded and decoded by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kvprofile import KVMerger
from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.profile.fingerprint import model_facts
from kvprofile.profile.storage import profile_of
from kvprofile.runtime.backends import blockwise
from tests.unit.architectures import build
from tests.unit.builders import slots_in
from tests.unit.merge_reference import read, read_padded, reference_logits, relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

PROMPT, DECODED = 80, 36  # long enough that the tail is packed again
INT8, INT4 = ("int8", "int8"), ("int4", "int4")
# Two heads that merge and drop, packed alike; apart; keys and values apart; one that keeps all its tokens; 16 bits and none.
PLANS = {
    "one shelf": [head("gauss", share=0.553, codecs=INT8), head("value-attention", share=0.718, codecs=INT8)],
    "two shelves": [head("absorb", share=0.553, codecs=INT4), head("h2o", share=0.718, codecs=("int8", "turbo3"))],
    "all kept in one": [head("gauss", share=0.553, codecs=("none", "int2")), head("h2o", codecs=("fp8-e4m3", "int6"))],
    "beside none": [head("gauss", share=0.553), head("gauss", codecs=("int3", "bfloat16"))],
    "all kept": [head("gauss", codecs=INT8), head("gauss", codecs=("float16", "turbo4"))],
}


def means_of(model: PreTrainedModel) -> np.ndarray:
    facts = model_facts(model.config)
    shape = facts["layers"], facts["kv_heads"], facts["head_dim"]
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()


def attached(model: PreTrainedModel, heads: list[dict[str, Any]]) -> KVMerger:
    return KVMerger.from_profile(profile_values(model, heads), arrays={"key_mean": means_of(model)}).attach(model)


def packed(slots, plan: dict[str, Any], mean: np.ndarray):
    """Every new slot as its codecs give it back, in float64."""
    key_codec, value_codec = CODECS[plan["key_codec"]], CODECS[plan["value_codec"]]
    mean = torch.from_numpy(mean).float()
    stored = []
    for key, value, bias in slots:
        vectors = []
        for codec, vector, centre in ((key_codec, key, mean), (value_codec, value, None)):
            parts = codec.encode(torch.from_numpy(np.asarray(vector)).float(), centre)
            found = codec.decode(parts, len(vector), centre)
            vectors.append((turn_back(found) if codec.rotated else found).double().numpy())
        stored.append((*vectors, bias))
    return stored


@torch.no_grad()
def check(model: PreTrainedModel, heads: list[dict[str, Any]], cuts: list[int]) -> None:
    text, means, profile = tiny_text(PROMPT + DECODED), means_of(model), profile_values(model, heads)
    expected, layers = reference_logits(model, profile, text, cuts, pack=packed, means=means)
    merger = KVMerger.from_profile(profile, arrays={"key_mean": means}).attach(model)
    cache = merger.cache()
    actual = read(model, cache, text, cuts)
    merger.detach()
    # Float32 and float64 round a number to another code once in a while, and biases of packed slots have 16 bits.
    error = relative_error(actual, expected)
    assert error < 2e-3
    # The comparison means something.
    merger = KVMerger.from_profile(
        profile_values(model, [head(one["policy"], share=one["share"]) for one in heads])
    ).attach(model)
    assert relative_error(read(model, merger.cache(), text, cuts), expected) > 3 * error
    merger.detach()
    held = {
        entry["layer"]: [len(one.slots) + len(one.tail) for one in layers[entry["layer"]].heads]
        for entry in profile["plan"]["layers"]
    }
    assert {index: cache.slots()[index][0] for index in held} == held


@pytest.mark.parametrize("name", PLANS)
def test_what_is_stored_is_what_the_codecs_give_back(name):
    check(tiny_model(), PLANS[name], [PROMPT])


def test_a_prompt_in_pieces():
    check(tiny_model(), PLANS["two shelves"], [40, PROMPT, PROMPT + 30])


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS"])
def test_with_soft_caps_and_sinks(name):
    model = build(name)
    kv_heads = model_facts(model.config)["kv_heads"]
    check(model, [PLANS["two shelves"][index % 2] for index in range(kv_heads)], [PROMPT])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_row_of_a_padded_batch_is_what_it_would_be_alone(dtype):
    model, text, steps = (
        tiny_model().to(dtype),
        tiny_text(130, batch=3),
        [(0, 90), *((at, at + 1) for at in range(90, 130))],
    )
    # A policy that goes by age alone: no rounding makes it choose otherwise.
    merger = attached(model, [head("streaming", share=0.5, codecs=("int8", "int4")), head("streaming", codecs=INT8)])
    paddings = [0, 20, 51]
    caches = [merger.cache() for _ in range(4)]
    together = read_padded(model, caches[0], text, paddings, steps)
    for row, padding in enumerate(paddings):
        alone = read_padded(model, caches[row + 1], text[row : row + 1], [padding], steps)
        for found, own in zip(together, alone, strict=True):
            assert relative_error(found[row : row + 1], own) < (1e-3 if dtype == torch.float32 else 0.05)
        assert [layer[row] for layer in caches[0].slots()] == [layer[0] for layer in caches[row + 1].slots()]
    merger.detach()


@torch.no_grad()
def test_what_is_stored_is_never_packed_again_and_copies_are_copies():
    model, text = tiny_model(), tiny_text(250, batch=2)
    merger = KVMerger.from_profile(
        profile_values(model, PLANS["two shelves"]), arrays={"key_mean": means_of(model)}
    ).attach(model)
    cache = merger.cache()
    model(text[:, :120], past_key_values=cache)
    first = slots_in(cache.layers[0].state)
    twin = copy.deepcopy(cache)
    for at in range(120, 200):
        model(text[:, at : at + 1], past_key_values=cache)
    grown, untouched = slots_in(cache.layers[0].state), slots_in(twin.layers[0].state)
    for part in ("keys", "values", "bias"):
        assert torch.equal(getattr(untouched, part), getattr(first, part))
        pieces = zip(getattr(first, part).split(first.lengths), getattr(grown, part).split(grown.lengths), strict=True)
        assert all(torch.equal(before, after[: len(before)]) for before, after in pieces)
    assert all(after > before for before, after in zip(first.lengths, grown.lengths, strict=True))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    taken = slots_in(cache.layers[0].state)
    assert taken.lengths == grown.lengths[2:] + grown.lengths[2:] + grown.lengths[:2]
    cache.crop(-5)
    assert cache.get_seq_length() == 195
    merger.detach()


@torch.no_grad()
@pytest.mark.parametrize("numbers", [1, 16 * 16 * 3])
def test_a_few_blocks_at_a_time_give_the_same(monkeypatch, numbers):
    model, text = tiny_model(), tiny_text(150)
    merger = KVMerger.from_profile(
        profile_values(model, PLANS["two shelves"]), arrays={"key_mean": means_of(model)}
    ).attach(model)
    found = []
    for most in (1 << 18, numbers):
        monkeypatch.setattr(blockwise, "NUMBERS", most)
        found.append(read(model, merger.cache(), text, [140]))
    assert relative_error(*found) < 1e-5
    merger.detach()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_are_those_of_the_codecs_the_tail_and_the_room_in_blocks(dtype):
    model = tiny_model(head_dim=64).to(dtype)
    size, tokens, batch = 16, 300, 2
    heads = [head("h2o", share=0.5, codecs=INT4), head("gauss", codecs=("int8", "turbo2"))]
    merger = attached(model, heads)
    cache = merger.cache()
    model(tiny_text(tokens, batch=batch), past_key_values=cache)
    assert cache.slots() == [[[150, 300]] * batch] * 2
    expected = 0
    for slots, pair in ((150, INT4), (300, ("int8", "turbo2"))):
        blocks = batch * -(-(slots - 32) // size)
        a_slot = CODECS[pair[0]].nbytes(64) + CODECS[pair[1]].nbytes(64)
        # Nothing is merged, so no slot has a bias. Of every block its head and its number of slots; of every head two counts.
        expected += blocks * (size * a_slot + 8 + 4) + 4 * (2 * batch * 2 + 1)
    tail = 2 * batch * 2 * 32 * 64 * dtype.itemsize
    mass = batch * 2 * 32 * 4
    assert cache.nbytes() == 2 * (expected + tail + mass + 2 * 64 * 4)
    merger.detach()


def test_means_that_are_missing_or_wrong_are_said_in_one_line():
    model = tiny_model()
    values = profile_values(model, PLANS["one shelf"])
    for profile in (values, profile_of(values)):
        with pytest.raises(
            KVProfileError, match=r"centred by means in the profile's arrays.*give the path.*or pass arrays="
        ):
            KVMerger.from_profile(profile)
    with pytest.raises(KVProfileError, match="hold no key_mean"):
        KVMerger.from_profile(values, arrays={})
    with pytest.raises(MismatchError, match=r"key_mean is \(2, 2, 15\), and the model needs \(2, 2, 16\)"):
        KVMerger.from_profile(values, arrays={"key_mean": means_of(model)[..., :15]})
    unknown = profile_values(model, [head("h2o", share=0.5, codecs=("x-mine", "none"))] * 2)
    with pytest.raises(MismatchError, match="codec x-mine cannot be run here; import the program"):
        KVMerger.from_profile(unknown, arrays={})
    plain = profile_values(model, [head("h2o", share=0.5, codecs=("bfloat16", "int4"))] * 2)
    KVMerger.from_profile(plain)
