"""Calls that a merged cache would follow into wrong numbers are refused in one line before they store anything."""

import copy
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, RwkvConfig, RwkvForCausalLM

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache
from tests.unit.merge_reference import read
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def merging(model: PreTrainedModel, share: float = 0.5) -> KVMerger:
    return KVMerger.from_profile(uniform_values(model, share=share)).attach(model)


def refused(told: str, cache: MergedCache, call: Any) -> None:
    seen = cache.get_seq_length()
    with pytest.raises(KVProfileError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert cache.get_seq_length() == seen


@pytest.mark.parametrize("share", [0.5, 1.0])
@torch.no_grad()
def test_a_cache_that_is_not_to_be_used(share):
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model, share).cache()
    told = "use_cache=False was passed beside a merged cache"
    refused(told, cache, lambda: model.generate(text, past_key_values=cache, use_cache=False, **OPTIONS))
    refused(told, cache, lambda: model(text, past_key_values=cache, use_cache=False))
    model.generation_config.use_cache = False
    refused(told, cache, lambda: model.generate(text, past_key_values=cache, **OPTIONS))


@pytest.mark.parametrize("longer", [1, 30])
@pytest.mark.parametrize("place", [0, 40, 79])
def test_a_text_that_is_not_the_next_turn(place, longer):
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model).cache()
    first = model.generate(text, past_key_values=cache, **OPTIONS)
    other = torch.cat([first, tiny_text(longer, seed=1)], dim=1)
    other[0, place] += 1
    refused("so they are no next turn", cache, lambda: model.generate(other, past_key_values=cache, **OPTIONS))
    other[0, place] -= 1
    model.generate(other, past_key_values=cache, **OPTIONS)
    cache.reset()
    model.generate(tiny_text(90, seed=2), past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}], ids=["at once", "in chunks"])
@pytest.mark.parametrize("turn", ["new tokens only", "the whole text"])
@torch.no_grad()
def test_turns_of_either_kind_one_after_the_other(turn, options):
    """A turn may come as the new tokens beside the mask of the whole text; the next one may come whole, and is compared."""
    model, text = tiny_model(), tiny_text(160)
    cache = merging(model).cache()
    model.generate(text[:, :80], past_key_values=cache, **{**OPTIONS, "max_new_tokens": 1})
    second = text[:, 80 if turn == "new tokens only" else 0 : 120]
    mask = torch.ones(1, 120, dtype=torch.long)
    model.generate(second, attention_mask=mask, past_key_values=cache, **{**OPTIONS, "max_new_tokens": 1, **options})
    assert cache.get_seq_length() == 120
    other = text.clone()
    other[0, 118] = (other[0, 118] + 1) % 50  # of what was read in chunks the last is compared
    refused(
        "do not begin with the 120 this cache has seen",
        cache,
        lambda: model.generate(other, past_key_values=cache, **OPTIONS),
    )
    model.generate(text, past_key_values=cache, **OPTIONS)
    assert cache.get_seq_length() == 164


def test_a_text_cropped_and_continued_otherwise():
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model).cache()
    model.generate(text, past_key_values=cache, **OPTIONS)
    cache.crop(-20)
    other = torch.cat([text[:, :64], tiny_text(40, seed=1)], dim=1)
    model.generate(other, past_key_values=cache, **OPTIONS)
    other[0, 63] += 1
    longer = torch.cat([other, tiny_text(40, seed=2)], dim=1)
    refused("so they are no next turn", cache, lambda: model.generate(longer, past_key_values=cache, **OPTIONS))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_weights(attention):
    model, text = tiny_model(attention=attention), tiny_text(80)
    cache = merging(model).cache()
    refused(
        "output_attentions was asked for", cache, lambda: model(text, past_key_values=cache, output_attentions=True)
    )
    if attention == "eager":
        whole = merging(model, 1.0).cache()
        found = model(text, past_key_values=whole, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in found] == [(1, 4, 80, 80)] * 2


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(training, share):
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model, share).cache()
    model.train(training)
    with pytest.raises(KVProfileError, match="passes no gradient; run the model under"):
        model(text, past_key_values=cache)
    # Without parameters to train there is no gradient to miss.
    model.requires_grad_(False)
    cache.reset()
    model(text, past_key_values=cache)


@pytest.mark.parametrize("where", ["configuration", "adapter"])
@torch.no_grad()
def test_a_model_in_training_that_leaves_things_out_at_random(where):
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model).cache()
    model(text[:, :70], past_key_values=cache)
    if where == "configuration":
        model.config.layerdrop = 0.1
    else:
        model.model.layers[1].self_attn.lora_dropout = torch.nn.Dropout(0.1)
    model.train()
    with pytest.raises(KVProfileError, match=r"this model is in training; call model\.eval\(\)"):
        model(text[:, 70:], past_key_values=cache)


@torch.no_grad()
def test_a_model_in_training_without_dropout_is_as_in_eval():
    model, text = tiny_model(), tiny_text(80)
    merger, answers = merging(model), []
    for training in (False, True):
        cache = merger.cache()
        model.train(training)
        answers += [model(piece, past_key_values=cache).logits for piece in text.split(70, dim=1)][1:]
    assert torch.equal(*answers)


def test_a_model_cast_or_switched_with_a_live_cache():
    model, text = tiny_model(), tiny_text(81)
    merger = merging(model)
    with torch.no_grad():
        cache = merger.cache()
        model(text[:, :80], past_key_values=cache)
        model.bfloat16()
        told = "the cache holds keys of torch.float32 on cpu and was given torch.bfloat16 on cpu"
        refused(told, cache, lambda: model(text[:, 80:], past_key_values=cache))
        model.float()
        model.set_attn_implementation("eager")
        told = "attention was switched to 'eager' after it was attached"
        refused(told, cache, lambda: model(text[:, 80:], past_key_values=cache))
        refused(told, cache, lambda: model.generate(text, past_key_values=cache, **OPTIONS))


@torch.no_grad()
def test_a_forward_compiled_after_its_cache_was_made():
    model, text = tiny_model(), tiny_text(80)
    cache = merging(model).cache()
    model.forward = torch.compile(model.forward, backend="eager")
    refused("the model is compiled", cache, lambda: model(text, past_key_values=cache))
    refused("the model is compiled", cache, lambda: model.generate(text, past_key_values=cache, **OPTIONS))


@torch.no_grad()
def test_a_copy_of_an_attached_model_is_attached_and_detached_by_itself():
    model, text = tiny_model(), tiny_text(100)
    merger = merging(model)
    expected = read(model, merger.cache(), text, [90])
    twin = copy.deepcopy(model)
    other = KVMerger.from_profile(uniform_values(twin, share=0.5)).attach(twin)
    assert torch.equal(read(twin, other.cache(), text, [90]), expected)
    other.detach()
    assert twin.config._attn_implementation == "sdpa"
    assert not twin._forward_pre_hooks
    assert vars(twin).keys() == vars(tiny_model()).keys()
    assert torch.equal(read(model, merger.cache(), text, [90]), expected)
    merger.detach()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (None, "attach takes a transformers model, not NoneType"),
        ("smollm2-135m", "attach takes a transformers model, not str"),
        (torch.nn.Linear(2, 2), "attach takes a transformers model, not Linear"),
        (MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)), "has no attention heads"),
        (RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)), "has no attention heads"),
    ],
    ids=["None", "a name", "a layer", "Mamba", "RWKV"],
)
def test_what_cannot_be_attached(thing, told):
    merger = KVMerger.from_profile(uniform_values(tiny_model()))
    with pytest.raises(KVProfileError, match=told):
        merger.attach(thing)


def test_a_model_with_a_learned_prefix():
    model = tiny_model()
    # As peft's wrapper shows it.
    model.active_peft_config = type("PrefixTuningConfig", (), {"is_prompt_learning": True})()
    merger = KVMerger.from_profile(uniform_values(model))
    with pytest.raises(KVProfileError, match="puts learned keys before every text"):
        merger.attach(model)
