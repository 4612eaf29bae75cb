"""Sliding layers whose window is packed: against float64 loops, against the stock cache, and where their users are."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.merging.protect import Protection
from kvprofile.profile.storage import profile_of
from kvprofile.runtime import window_attention as module
from kvprofile.runtime.block_size import RECENT
from kvprofile.runtime.window import PackedWindow
from tests.pretend_cuda import on_cuda, over_two
from tests.unit.architectures import build
from tests.unit.merge_reference import pieces, read, read_padded, relative_error
from tests.unit.test_runtime_cuda import check_budget, forwards, padded
from tests.unit.tiny_models import tiny_model, tiny_text
from tests.unit.window_reference import means_of, window_logits, windowed_values

WINDOW = 90
# Windows and chunks in the models' configurations.
SIZED = {
    "Gemma 2": {"sliding_window": WINDOW},
    "Gemma 3": {"sliding_window": WINDOW},
    "Gemma 3n": {"sliding_window": WINDOW},
    "GPT-OSS": {"sliding_window": WINDOW},
    "OLMo 3": {"sliding_window": WINDOW},
    "Cohere 2": {"sliding_window": WINDOW},
    "Llama 4": {"attention_chunk_size": WINDOW},
}
MIXED = (("int8", "int4"), ("none", "turbo3"))
ALIKE = (("int6", "fp8-e4m3"),)


def merger_of(model, pairs=MIXED, share=1.0) -> KVMerger:
    return KVMerger.from_profile(windowed_values(model, pairs, share), arrays={"key_mean": means_of(model)})


def windows_of(cache) -> list[PackedWindow]:
    return [layer for layer in cache.layers if isinstance(layer, PackedWindow)]


def test_the_newest_tokens_are_those_that_plans_and_policies_mean():
    assert Protection().recent == RECENT


@pytest.mark.parametrize("name", [name for name in SIZED if name != "Gemma 3n"])
@pytest.mark.parametrize("pairs", [MIXED, ALIKE], ids=["mixed", "alike"])
@torch.no_grad()
def test_what_is_read_is_what_the_codecs_give_back(monkeypatch, name, pairs):
    # A few tokens decoded at a time, a few queries.
    monkeypatch.setattr(module, "NUMBERS", 700)
    model, text, cuts = build(name, **SIZED[name]), tiny_text(210), [100, 170]
    expected = window_logits(model, pairs, text, cuts, WINDOW)
    merger = merger_of(model, pairs).attach(model)
    cache = merger.cache()
    found = read(model, cache, text, cuts)
    merger.detach()
    error = relative_error(found, expected)
    assert error < 2e-3
    assert relative_error(read(model, DynamicCache(config=model.config), text, cuts), expected) > 3 * error
    (layer,) = windows_of(cache)
    # 89 of 210 tokens: 32 to 63 of them newest ones, and up to 31 more that have passed.
    assert layer.tail.tokens == 32 + (210 - 170) % 32
    assert layer.stored == 89 - 32


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_sixteen_bits_are_nearly_the_stock_cache(name):
    model, text, cuts = build(name, **SIZED[name]), tiny_text(260), [100, 150]
    expected = read(model, DynamicCache(config=model.config), text, cuts)
    merger = merger_of(model, [("float16", "float16")]).attach(model)
    cache = merger.cache()
    found = read(model, cache, text, cuts)
    assert torch.equal(found[:, :100], expected[:, :100])
    assert relative_error(found, expected) < 1e-3
    assert windows_of(cache)
    assert all(layer.stored for layer in windows_of(cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_every_row_of_a_padded_batch_is_what_it_would_be_alone(dtype):
    model = build("Gemma 3", **SIZED["Gemma 3"]).to(dtype)
    text, paddings = tiny_text(190, batch=3), [0, 20, 51]
    steps = [(0, 130), *((at, at + 1) for at in range(130, 190))]
    merger = merger_of(model, share=0.5).attach(model)
    together = read_padded(model, merger.cache(), text, paddings, steps)
    for row, padding in enumerate(paddings):
        alone = read_padded(model, merger.cache(), text[row : row + 1], [padding], steps)
        for found, own in zip(together, alone, strict=True):
            assert relative_error(found[row : row + 1], own) < (1e-3 if dtype == torch.float32 else 0.08)
    merger.detach()


@pytest.mark.parametrize("name", ["Gemma 3", "Gemma 3n", "GPT-OSS"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@torch.no_grad()
def test_generate_says_what_the_stock_cache_says(name, options):
    model, text = build(name, **SIZED[name]), tiny_text(120, batch=2)
    options = {"max_new_tokens": 50, "do_sample": False} | options
    torch.manual_seed(0)
    expected = model.generate(text, **options)
    merger = merger_of(model, [("float16", "float16")]).attach(model)
    torch.manual_seed(0)
    found = model.generate(text, past_key_values=merger.cache(), **options)
    merger.detach()
    # Nearly equal logits, so nearly always the same token: once one differs, what follows may.
    assert (found == expected).float().mean() > 0.9


@torch.no_grad()
def test_drafted_tokens_that_are_rejected_leave_no_trace():
    model, text = build("Gemma 3", **SIZED["Gemma 3"]), tiny_text(40).repeat(1, 3)
    merger = merger_of(model).attach(model)
    cache = merger.cache()
    removed = []
    crop = cache.crop
    cache.crop = lambda tokens: (crop(tokens), removed.append(-tokens))
    found = model.generate(
        text,
        past_key_values=cache,
        max_new_tokens=60,
        do_sample=False,
        prompt_lookup_num_tokens=4,
        max_matching_ngram_size=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert sum(map(bool, removed)) > 5
    fresh = merger.cache()
    for low, high in pieces(found.sequences[:, :-1], [120]):
        logits = model(found.sequences[:, low:high], past_key_values=fresh).logits
    # Forwards ended elsewhere, so a chunk may have been packed a few tokens sooner.
    assert relative_error(found.logits[-1], logits[:, -1]) < 0.05
    assert cache.get_seq_length() == fresh.get_seq_length()


@torch.no_grad()
def test_a_crop_takes_back_what_is_not_packed_and_refuses_the_rest():
    model, text, rest = build("Gemma 3", **SIZED["Gemma 3"]), tiny_text(70), tiny_text(40, seed=1)
    merger = merger_of(model).attach(model)
    cache, shorter = merger.cache(), merger.cache()
    model(text, past_key_values=cache)
    model(text[:, :63], past_key_values=shorter)
    cache.crop(-7)
    # Within the window nothing has gone; 38 of the 63 were packed at once, 0 of the others.
    assert relative_error(model(rest, past_key_values=cache).logits, model(rest, past_key_values=shorter).logits) < 0.2
    cache = merger.cache()
    model(text, past_key_values=cache)
    with pytest.raises(KVProfileError, match="cannot take back 40 tokens of layer 0: those before them are packed"):
        cache.layers[0].crop(-40)
    model(rest, past_key_values=cache)
    with pytest.raises(KVProfileError, match="or have left its window of 90"):
        cache.layers[0].crop(-20)
    with pytest.raises(KVProfileError, match="minus the number"):
        cache.layers[0].crop(3)


@torch.no_grad()
def test_bytes_are_those_of_all_live_tensors_and_copies_are_copies():
    model = build("Gemma 3", **SIZED["Gemma 3"]).bfloat16()
    text = tiny_text(300, batch=2)
    merger = merger_of(model, [("int4", "int4")]).attach(model)
    cache = merger.cache()
    for low, high in pieces(text, [299]):
        model(text[:, low:high], past_key_values=cache)
    layer = cache.layers[0]
    twin = copy.deepcopy(cache)
    before = [part.clone() for part in layer.packed[0].keys]
    # 57 tokens in int4, 33 in 16 bits, 8 columns of slack in the tail, and the heads' means.
    codes = 2 * 57 * 2 * 2 * (8 + 4)
    tail, means = 2 * 2 * (33 + 8) * 2 * 16 * 2, 2 * 16 * 4
    assert sum(part.untyped_storage().nbytes() for part in layer.tensors()) == codes + tail + means
    for at in range(40):
        model(text[:, at : at + 1], past_key_values=cache)
    assert all(map(torch.equal, twin.layers[0].packed[0].keys, before))
    merger.detach()
    cache.reset()
    assert not layer.tensors()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS"])
def test_one_device_and_two_give_the_processor_s_numbers(gpu, name):
    model = build(name, **SIZED[name])
    text, mask = padded(150, 3, "cpu")
    merger = merger_of(model, share=0.5).attach(model)
    expected = torch.cat(list(forwards(model, merger, text, mask)), 1)
    merger.detach()
    for place in (on_cuda, over_two):
        there = place(copy.deepcopy(model))
        merger = merger_of(there, share=0.5).attach(there)
        found = torch.cat(list(forwards(there, merger, text.to("cuda"), mask.to("cuda"))), 1)
        # On a processor the full layers may be served by another back end.
        assert relative_error(found.cpu(), expected) < 1e-5


def test_the_host_waits_no_more_often_for_packed_windows(gpu):
    model = on_cuda(build("Gemma 3", **SIZED["Gemma 3"]).to(torch.bfloat16))
    text, mask = padded(182, 3, "cuda")
    merger = merger_of(model, share=0.5).attach(model)
    counts = []
    gpu.forget()
    for _ in forwards(model, merger, text, mask):
        counts.append(sum(count for where, count in gpu.syncs.items() if not where.startswith("models/")))
        gpu.forget()
    check_budget(counts)


@torch.no_grad()
def test_seven_query_heads_a_kv_head():
    model = tiny_model("gemma3", num_attention_heads=14, hidden_size=112, sliding_window=WINDOW)
    text, cuts = tiny_text(130), [100]
    expected = window_logits(model, MIXED, text, cuts, WINDOW)
    merger = merger_of(model).attach(model)
    assert relative_error(read(model, merger.cache(), text, cuts), expected) < 2e-3
    merger.detach()


@torch.no_grad()
def test_what_would_go_wrong_without_a_word_is_refused():
    model, other = build("Gemma 3", **SIZED["Gemma 3"]), build("Gemma 3", **SIZED["Gemma 3"])
    merger = merger_of(model).attach(model)
    cache = merger.cache()
    model(tiny_text(120), past_key_values=cache)
    second = merger_of(other).attach(other)
    with pytest.raises(KVProfileError, match="made for another model"):
        other(tiny_text(1), past_key_values=merger.cache())
    second.detach()
    with pytest.raises(KVProfileError, match="holds 1 batch rows and was given 2"):
        model(tiny_text(1, batch=2), past_key_values=copy.deepcopy(cache))
    merger.detach()
    with pytest.raises(KVProfileError, match="a model that is not attached"):
        model(tiny_text(1), past_key_values=cache)


def test_a_profile_that_packs_what_is_no_window_is_refused():
    model = build("Gemma 3", **SIZED["Gemma 3"])
    values = windowed_values(model, MIXED)
    assert profile_of(values).plan.windows[0].layer == 0
    for change, told in (
        ({"layer": 1}, "plan.windows must list layers with a window in order"),
        ({"heads": values["plan"]["windows"][0]["heads"][:1]}, "has 1 heads, not 2"),
    ):
        wrong = copy.deepcopy(values)
        wrong["plan"]["windows"][0] |= change
        with pytest.raises(MismatchError, match=told):
            profile_of(wrong)
    del values["model"]["window"]
    with pytest.raises(MismatchError, match="must list layers with a window"):
        profile_of(values)
