"""What the runtime cannot do it says, in one line; it never gives wrong numbers instead."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.runtime.install import install
from tests.unit.merge_reference import read
from tests.unit.tiny_models import VOCAB, tiny_model, tiny_text, uniform_values

NOT_ATTACHED = "a merged cache was used with a model that is not attached"


def merging(model: PreTrainedModel, policy: str = "gauss", share: float = 0.5) -> KVMerger:
    return KVMerger.from_profile(uniform_values(model, policy, share=share)).attach(model)


# -- the batch and the mask


@pytest.mark.parametrize("tokens", [20, 120], ids=["short", "long"])
@pytest.mark.parametrize("place", [slice(-7, None), slice(5, 9)], ids=["right", "middle"])
@torch.no_grad()
def test_padding_that_is_not_on_the_left(tokens, place):
    model, text = tiny_model(), tiny_text(tokens, batch=2)
    mask = torch.ones_like(text)
    mask[0, place] = 0
    cache = merging(model).cache()
    with pytest.raises(KVProfileError, match=r"takes padding on the left only; set tokenizer\.padding_side = 'left'"):
        model(text, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_batch_padded_after_the_prompt():
    model, text = tiny_model(), tiny_text(120, batch=2)
    cache = merging(model).cache()
    model(text, past_key_values=cache)
    mask = torch.ones(2, 121, dtype=torch.long)
    mask[1, 120] = 0
    with pytest.raises(KVProfileError, match="takes padding on the left only"):
        model(text[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("later", [None, 5, 9])
@torch.no_grad()
def test_a_mask_that_changes_on_the_way(later):
    model, text = tiny_model(), tiny_text(120, batch=2)
    cache = merging(model).cache()
    mask = torch.ones(2, 121, dtype=torch.long)
    mask[1, :7] = 0
    model(text, attention_mask=mask[:, :120], past_key_values=cache)
    if later is not None:
        mask[1] = 1
        mask[1, :later] = 0
    with pytest.raises(KVProfileError, match=rf"now shows {later or 0} tokens of padding in row 1, and 7 before"):
        model(text[:, :1], attention_mask=None if later is None else mask, past_key_values=cache)


@torch.no_grad()
def test_a_mask_of_the_new_tokens_only():
    model, text = tiny_model(), tiny_text(120)
    cache = merging(model).cache()
    model(text, past_key_values=cache)
    with pytest.raises(KVProfileError, match="attention_mask covers 3 tokens, but with these the cache has seen 123"):
        model(text[:, :3], attention_mask=torch.ones(1, 3), past_key_values=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_4d_mask(attention):
    model, text = tiny_model(attention=attention), tiny_text(120)
    cache = merging(model).cache()
    mask = torch.zeros(1, 1, 120, 120).masked_fill(torch.ones(120, 120).triu(1).bool(), -1e9)
    with pytest.raises(KVProfileError, match="custom 4D attention mask"):
        model(text, attention_mask=mask, past_key_values=cache)


# -- the cache and its model


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_cache_used_with_a_model_that_is_not_attached(layers):
    model, other = (tiny_model(num_hidden_layers=layers, seed=seed) for seed in (0, 1))
    text = tiny_text(130)
    cache = merging(model).cache()
    with pytest.raises(KVProfileError, match=NOT_ATTACHED):
        read(other, cache, text, [120])


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_cache_used_after_detach(layers):
    model, text = tiny_model(num_hidden_layers=layers), tiny_text(121)
    merger = merging(model)
    cache = merger.cache()
    model(text[:, :120], past_key_values=cache)
    merger.detach()
    # One layer or two: without our attention the merged slots would be left out.
    with pytest.raises(KVProfileError, match=NOT_ATTACHED):
        model(text[:, 120:], past_key_values=cache)


def test_a_cache_before_attach():
    merger = KVMerger.from_profile(uniform_values(tiny_model()))
    with pytest.raises(KVProfileError, match=r"not attached to a model; call merger.attach\(model\) first"):
        merger.cache()


def test_a_cache_after_detach():
    merger = merging(tiny_model())
    merger.detach()
    with pytest.raises(KVProfileError, match="not attached to a model"):
        merger.cache()


def test_attaching_twice():
    model = tiny_model()
    merger = merging(model)
    with pytest.raises(KVProfileError, match="attached already"):
        merger.attach(model)
    merger.detach()
    assert model.config._attn_implementation == "sdpa"


def _failing(*_arguments: Any) -> None:
    raise ZeroDivisionError("out of memory, say")


@pytest.mark.parametrize("merged_before", [False, True], ids=["first forward", "later forward"])
@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_a_cache_whose_forward_failed_half_way(part, layer, merged_before):
    model, text = tiny_model(num_hidden_layers=3), tiny_text(130)
    merger = merging(model)
    expected = read(model, merger.cache(), text, [120])
    cache = merger.cache()
    if merged_before:
        model(text[:, :120], past_key_values=cache)
    hook = model.get_submodule(f"model.layers.{layer}.{part}").register_forward_pre_hook(_failing)
    with pytest.raises(ZeroDivisionError):
        model(text[:, cache.get_seq_length() : 121], past_key_values=cache)
    hook.remove()
    with pytest.raises(KVProfileError, match="failed half-way in an earlier forward"):
        model(text[:, 120:121], past_key_values=cache)
    assert torch.equal(read(model, merger.cache(), text, [120]), expected)


@torch.no_grad()
def test_a_cache_whose_batch_was_refused():
    model, text = tiny_model(), tiny_text(60, batch=2)
    mask = torch.ones_like(text)
    mask[0, 30:40] = 0
    cache = merging(model).cache()
    with pytest.raises(KVProfileError, match="padding"):
        model(text, attention_mask=mask, past_key_values=cache)
    # The first layer has stored the refused batch: going on would be wrong.
    with pytest.raises(KVProfileError, match=r"new merger\.cache\(\)"):
        model(text, past_key_values=cache)


@torch.no_grad()
def test_a_reset_mends_a_cache_whose_forward_failed():
    model, text = tiny_model(), tiny_text(130)
    merger = merging(model)
    expected = read(model, merger.cache(), text, [120])
    cache = merger.cache()
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(_failing)
    with pytest.raises(ZeroDivisionError):
        model(text, past_key_values=cache)
    hook.remove()
    cache.reset()
    assert torch.equal(read(model, cache, text, [120]), expected)


# -- what cannot be undone


@torch.no_grad()
def test_offloading():
    model = tiny_model()
    cache = merging(model).cache()
    model(tiny_text(120), past_key_values=cache)
    for action in (cache.layers[0].offload, cache.layers[0].prefetch, lambda: cache.offload(0)):
        with pytest.raises(KVProfileError, match="cannot be offloaded"):
            action()


# -- the model


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "something_unknown"])
def test_an_attention_implementation_without_a_counterpart(implementation):
    model = tiny_model()
    merger = KVMerger.from_profile(uniform_values(model))
    model.config._attn_implementation_internal = implementation
    with pytest.raises(KVProfileError, match=f"'{implementation}'; load it with attn_implementation='sdpa' or 'eager'"):
        merger.attach(model)
    assert model.config._attn_implementation == implementation
    model.config._attn_implementation_internal = "sdpa"
    assert merger.attach(model).cache().get_seq_length() == 0


def test_a_model_in_training():
    model = tiny_model().train()
    merger = KVMerger.from_profile(uniform_values(model, share=0.5))
    with pytest.raises(KVProfileError, match=r"call model\.eval\(\) first"):
        merger.attach(model)
    for layer in model.eval().model.layers:
        layer.self_attn.attention_dropout = 0.1
    cache = merger.attach(model).cache()
    model.train()
    with pytest.raises(KVProfileError, match=r"call model\.eval\(\)"), torch.no_grad():
        model(tiny_text(100), past_key_values=cache)


def test_an_encoder_decoder():
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(KVProfileError, match=r"(encoder-decoder|does not use transformers' attention interface)"):
        install(model)


# -- other ways to run a model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["call", "forward", "wrapper"])
def test_a_compiled_model(way, when):
    model = tiny_model()
    merger = KVMerger.from_profile(uniform_values(model, share=0.5))
    if when == "after":
        merger.attach(model)
    target = model
    match way:
        case "call":
            model.compile(backend="eager")
        case "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        case "wrapper":
            target = torch.compile(model, backend="eager")
    if way == "wrapper" and when == "after":
        # The model itself is not compiled, and `generate` of the wrapper is that of the model.
        text = tiny_text(100)
        options = {"max_new_tokens": 5, "do_sample": False}
        expected = model.generate(text, past_key_values=merger.cache(), **options)
        assert torch.equal(target.generate(text, past_key_values=merger.cache(), **options), expected)
        return
    with pytest.raises(KVProfileError, match="the model is compiled"):
        merger.attach(target) if when == "before" else merger.cache()


def test_a_cache_is_not_compiled_by_generate():
    cache = merging(tiny_model()).cache()
    assert not cache.is_compileable
    assert cache.get_max_length() == -1


def test_a_trace_ends_where_keys_are_stored(monkeypatch):
    model = tiny_model()
    cache = merging(model).cache()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(KVProfileError, match="cannot be compiled; generate with the model itself"), torch.no_grad():
        model(tiny_text(20), past_key_values=cache)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_another_cache_asked_for_beside_ours(implementation):
    model = tiny_model()
    cache = merging(model).cache()
    with pytest.raises(ValueError, match="Please use only one of the two"):
        model.generate(tiny_text(20), past_key_values=cache, cache_implementation=implementation, max_new_tokens=2)


def test_continuous_batching():
    model, text = tiny_model(), tiny_text(20)
    merging(model)
    with pytest.raises(ValueError, match="is not supported for continuous batching"):
        model.generate_batch([text[0].tolist()], progress_bar=False)


# -- the profile


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 3}, "layers is 2 in the profile and 3 in the model"),
        ({"num_key_value_heads": 4}, "kv heads is 2 in the profile and 4 in the model"),
        ({"head_dim": 32}, "head dim is 16 in the profile and 32 in the model"),
        ({"rope_theta": 5e5}, "rope is"),
        ({"intermediate_size": 128}, "the configurations differ"),
    ],
    ids=str,
)
def test_a_profile_of_another_model(changes, told):
    merger = KVMerger.from_profile(uniform_values(tiny_model()))
    other = tiny_model(**changes)
    with pytest.raises(MismatchError, match=f"made for tiny and does not fit this model: {told}"):
        merger.attach(other)
    assert other.config._attn_implementation == "sdpa"
    merger.attach(tiny_model())


def test_a_profile_of_another_architecture():
    merger = KVMerger.from_profile(uniform_values(tiny_model("llama")))
    with pytest.raises(MismatchError, match="architecture is Llama in the profile and Qwen3 in the model"):
        merger.attach(tiny_model("qwen3"))


@pytest.mark.parametrize("version", [3, 0, "2", None])
def test_a_profile_of_another_version(version):
    values = {**uniform_values(tiny_model()), "schema_version": version}
    with pytest.raises(MismatchError, match=r"schema.version"):
        KVMerger.from_profile(values)


def keys_of(values: dict[str, Any]) -> list[list[str | int]]:
    """The places of every key the runtime reads."""
    found: list[list[str | int]] = []
    for place in ([], ["model"], ["policies", "gauss"], ["policies", "gauss", "protection"], ["plan"]):
        part = values
        for step in place:
            part = part[step]
        found += [[*place, key] for key in part]
    found += [["plan", "layers", 1, key] for key in ("layer", "heads")]
    found += [["plan", "layers", 1, "heads", 0, key] for key in ("policy", "epsilon", "share")]
    return found


# The schema fills these in.
_HAVE_DEFAULTS = (
    *("schema_version", "regression", "matching", "seed", "window"),
    *("bytes", "codec", "predicted_bytes", "predicted_codec_damage", "key_codec", "value_codec", "codec_damage"),
)
_NEEDED = [place for place in keys_of(uniform_values(tiny_model())) if place[-1] not in _HAVE_DEFAULTS]


@pytest.mark.parametrize("place", _NEEDED, ids=lambda place: ".".join(map(str, place)))
def test_a_profile_with_a_key_missing(place):
    model = tiny_model()
    values = copy.deepcopy(uniform_values(model))
    part = values
    for step in place[:-1]:
        part = part[step]
    del part[place[-1]]

    with pytest.raises(MismatchError, match=str(place[-1])):
        KVMerger.from_profile(values).attach(model)


@pytest.mark.parametrize("key", ["plan", "model", "policies"])
@pytest.mark.parametrize("value", [None, [], "", 3], ids=repr)
def test_a_profile_with_a_part_of_the_wrong_kind(key, value):
    with pytest.raises(MismatchError, match="the profile is not a valid profile"):
        KVMerger.from_profile({**uniform_values(tiny_model()), key: value})


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (["plan", "mode"], "fast", "plan.mode: Input should be"),
        (["plan", "layers", 0, "heads", 0, "share"], 1.5, "share: Input should be less than or equal to 1"),
        (["plan", "layers", 0, "heads", 0, "share"], float("nan"), "is no JSON"),
        (["plan", "layers", 0, "heads", 0, "epsilon"], float("nan"), "is no JSON"),
        (["plan", "layers", 0, "heads", 0, "epsilon"], "high", "epsilon: Input should be a valid number"),
        (["plan", "layers", 0, "heads", 0, "policy"], "best", "best"),
        (["plan", "layers", 0, "heads"], [], "has 0 heads, not 2"),
        (["plan", "layers", 0, "layer"], 7, "layer"),
        (
            ["model", "attention"],
            ["full_attention", "sliding_attention"],
            r"must list the full-attention layers \[0\]",
        ),
        (["policies", "gauss", "rule"], "cluster", "rule"),
        (["policies", "gauss", "affinity"], "taste", "affinity"),
        (["policies", "gauss", "combination", "weights"], "best", "weights"),
        (["policies", "gauss", "combination", "sigma"], 0, "sigma"),
        (["policies", "gauss", "surprise"], 1, "surprise"),
    ],
    ids=str,
)
def test_a_profile_with_a_value_that_cannot_be(place, value, told):
    model = tiny_model()
    values = copy.deepcopy(uniform_values(model))
    part = values
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    with pytest.raises(MismatchError, match=told):
        KVMerger.from_profile(values).attach(model)


def test_an_unknown_mode_asked_for():
    with pytest.raises(UsageError, match="unknown mode 'fast'; expected one of exact, threshold") as caught:
        KVMerger.from_profile(uniform_values(tiny_model()), mode="fast")
    assert caught.value.exit_code == 2


def test_a_file_that_is_cut_off(tmp_path):
    path = tmp_path / "profile.json"
    text = json.dumps(uniform_values(tiny_model()))
    for length in (0, 1, len(text) // 2, len(text) - 1):
        path.write_text(text[:length])
        with pytest.raises(MismatchError, match="is not a complete JSON file"):
            KVMerger.from_profile(path)
    path.write_text(text)
    assert KVMerger.from_profile(str(path)).settings.model_name == "tiny"


def test_a_file_that_is_no_profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text("[1, 2]")
    with pytest.raises(MismatchError, match="is not a kvprofile profile"):
        KVMerger.from_profile(path)
    path.write_text('{"hello": 1}')
    with pytest.raises(MismatchError, match="it has no schema_version"):
        KVMerger.from_profile(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KVProfileError, match="cannot read the profile"):
        KVMerger.from_profile(path)
    with pytest.raises(KVProfileError, match="no profile at"):
        KVMerger.from_profile(tmp_path / "nowhere.json")


def test_every_message_is_one_line():
    model = tiny_model()
    merger = merging(model)
    for action in (lambda: merger.attach(model), lambda: KVMerger.from_profile({}), lambda: merger.cache().crop(1)):
        with pytest.raises(KVProfileError) as caught:
            action()
        assert "\n" not in str(caught.value)
