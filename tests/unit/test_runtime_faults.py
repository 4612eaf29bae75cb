"""After whatever went wrong, a model is itself again and a new cache gives what it always gave."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    StoppingCriteria,
)

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache
from tests.unit.architectures import build
from tests.unit.merge_reference import read
from tests.unit.tiny_models import VOCAB, tiny_model, tiny_text, uniform_values

OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}


def merging(model: PreTrainedModel, policy: str = "gauss") -> KVMerger:
    return KVMerger.from_profile(uniform_values(model, policy, share=0.5)).attach(model)


def _failing(*_arguments: Any, **_options: Any) -> None:
    raise ZeroDivisionError("out of memory, say")


# -- errors on the way


class _Interrupt(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        if input_ids.shape[1] >= self.tokens:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3n"])
def test_a_clean_generation_after_one_that_was_interrupted(name):
    model, text = build(name), tiny_text(100)
    merger = merging(model)
    expected = model.generate(text, past_key_values=merger.cache(), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        model.generate(text, past_key_values=merger.cache(), stopping_criteria=[_Interrupt(120)], **OPTIONS)
    layers = getattr(model.model, "layers", None) or model.model.language_model.layers
    for layer in (layers[-1], layers[0]):
        hook = layer.mlp.register_forward_pre_hook(_failing)
        with pytest.raises(ZeroDivisionError):
            model.generate(text, past_key_values=merger.cache(), **OPTIONS)
        hook.remove()
    assert torch.equal(model.generate(text, past_key_values=merger.cache(), **OPTIONS), expected)
    merger.detach()
    assert torch.equal(
        model.generate(text, **OPTIONS),
        model.generate(text, past_key_values=DynamicCache(config=model.config), **OPTIONS),
    )


@torch.no_grad()
def test_a_model_that_fails_while_it_is_attached_is_as_it_was():
    model, text = tiny_model(), tiny_text(30)
    before, attributes = model(text).logits, dict(vars(model))
    hook = model.model.layers[1].mlp.register_forward_pre_hook(_failing)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5))
    with pytest.raises(ZeroDivisionError):
        merger.attach(model)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert vars(model) == attributes
    assert torch.equal(model(text).logits, before)
    merger.attach(model)
    assert merger.cache().get_seq_length() == 0


# -- several of everything


@torch.no_grad()
def test_two_models_attached_at_once():
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    text = tiny_text(140)
    mergers = [KVMerger.from_profile(uniform_values(models[0], share=0.5)) for _ in models]
    alone = []
    for model, merger in zip(models, mergers, strict=True):
        merger.attach(model)
        alone.append(read(model, merger.cache(), text, [100]))
        merger.detach()
    for model, merger in zip(models, mergers, strict=True):
        merger.attach(model)
    caches = [merger.cache() for merger in mergers]
    parts: list[list[Tensor]] = [[], []]
    for piece in (text[:, :100], *text[:, 100:].split(1, dim=1)):
        for model, cache, part in zip(models, caches, parts, strict=True):
            part.append(model(piece, past_key_values=cache).logits)
    for part, expected in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(part, dim=1), expected)
    mergers[0].detach()
    # The second model is still attached, and its cache goes on.
    longer = tiny_text(5, seed=7)
    assert torch.isfinite(models[1](longer, past_key_values=caches[1]).logits).all()


@pytest.mark.parametrize("share", [0.5, 1.0])
@torch.no_grad()
def test_a_cache_of_another_attached_model(share):
    models = [tiny_model(seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    mergers = [KVMerger.from_profile(uniform_values(model, share=share)).attach(model) for model in models]
    with pytest.raises(KVProfileError, match="made for another model; use the cache"):
        models[1](tiny_text(20), past_key_values=mergers[0].cache())


def test_threads_with_caches_of_their_own():
    model = tiny_model()
    merger = merging(model, "absorb")
    texts = [tiny_text(90 + 20 * number, seed=number) for number in range(4)]

    def answer(text: Tensor) -> Tensor:
        return model.generate(text, past_key_values=merger.cache(), **OPTIONS)

    expected = [answer(text) for text in texts]
    found: list[Tensor | None] = [None] * len(texts)
    start = threading.Barrier(len(texts))

    def work(number: int) -> None:
        start.wait()
        found[number] = answer(texts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


# -- detach


@torch.no_grad()
def test_detach_in_any_state():
    model, text = tiny_model(), tiny_text(130)
    attributes, expected = dict(vars(model)), model(text).logits
    merger = KVMerger.from_profile(uniform_values(model, share=0.5))
    merger.detach()
    for spoil in (_unused, _with_a_cache, _after_a_failure, _amid_a_forward):
        merger.attach(model)
        spoil(model, merger, text)
        merger.detach()
        merger.detach()
        assert vars(model) == attributes
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(text).logits, expected)


def _unused(model: PreTrainedModel, merger: KVMerger, text: Tensor) -> None:
    pass


def _with_a_cache(model: PreTrainedModel, merger: KVMerger, text: Tensor) -> None:
    model(text, past_key_values=merger.cache())


def _after_a_failure(model: PreTrainedModel, merger: KVMerger, text: Tensor) -> None:
    hook = model.model.layers[0].mlp.register_forward_pre_hook(_failing)
    with pytest.raises(ZeroDivisionError):
        model(text, past_key_values=merger.cache())
    hook.remove()


def _amid_a_forward(model: PreTrainedModel, merger: KVMerger, text: Tensor) -> None:
    cache = merger.cache()
    model(text[:, :120], past_key_values=cache)
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: merger.detach())
    with pytest.raises(KVProfileError, match="was detached"):
        model(text[:, 120:], past_key_values=cache)
    hook.remove()


@torch.no_grad()
def test_parts_of_a_model_get_their_own_implementations_back():
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 24,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    parts = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=parts).eval()
    tokens = tiny_text(100, vocabulary=600)
    before, image = model(tokens).logits, torch.randn(1, 3, 28, 28)
    seen = model.model.get_image_features(image).pooler_output

    def implementations() -> list[str]:
        return [one._attn_implementation for one in (config, config.text_config, config.vision_config)]

    config = model.config
    assert implementations() == ["sdpa", "sdpa", "eager"]
    merger = merging(model)
    assert implementations()[2] == "eager"
    cache = merger.cache()
    assert torch.equal(model(tokens, past_key_values=cache).logits, before)
    assert cache.slots()[0] == [[50, 50]]
    assert torch.equal(model.model.get_image_features(image).pooler_output, seen)
    merger.detach()
    assert implementations() == ["sdpa", "sdpa", "eager"]
    assert torch.equal(model(tokens).logits, before)


# -- a cache in the wrong place


def _reused(length: int, padding: int = 0, **more: int) -> Callable[[PreTrainedModel, MergedCache], Any]:
    text = tiny_text(length, seed=5)
    mask = torch.ones_like(text)
    mask[:, :padding] = 0
    return lambda model, cache: model.generate(text, attention_mask=mask, past_key_values=cache, **OPTIONS, **more)


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (_reused(60), "no new tokens: the cache has seen 139 tokens"),
        (_reused(139), "no new tokens: the cache has seen 139 tokens"),
        (_reused(120), "no new tokens: the cache has seen 139 tokens"),
        (_reused(120, prefill_chunk_size=16), "no new tokens: the cache has seen 139 tokens"),
        (_reused(139, padding=3), "no new tokens: the cache has seen 139 tokens"),
        (_reused(150, prompt_lookup_num_tokens=3), "assisted decoding would read the 139 tokens"),
        (_reused(150, padding=3, prompt_lookup_num_tokens=3), "assisted decoding would read the 139 tokens"),
        (_reused(150, padding=3), "the 150 tokens passed do not begin with the 139 this cache has seen"),
        (
            lambda model, cache: model(tiny_text(20, batch=2), past_key_values=cache),
            "the cache holds 1 batch rows and was given 2",
        ),
    ],
    ids=[
        "much shorter text",
        "text as long",
        "shorter text",
        "shorter text in chunks",
        "padded text",
        "assisted",
        "assisted and padded",
        "longer padded text",
        "another batch",
    ],
)
@torch.no_grad()
def test_a_cache_used_again_by_mistake(use, told):
    model, text = tiny_model(), tiny_text(100)
    cache = merging(model).cache()
    model.generate(text, past_key_values=cache, **OPTIONS)
    with pytest.raises(KVProfileError, match=told):
        use(model, cache)


@pytest.mark.parametrize("save", [pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())], ids=["pickle", "torch"])
@torch.no_grad()
def test_a_cache_cannot_be_saved(save):
    model = tiny_model()
    cache = merging(model).cache()
    model(tiny_text(100), past_key_values=cache)
    with pytest.raises(KVProfileError, match="cannot be pickled or saved"):
        save(cache)


@torch.no_grad()
def test_a_copy_made_while_tokens_are_drafted_holds_no_model():
    model, text = tiny_model(), tiny_text(130)
    merger = merging(model, "absorb")
    cache = merger.cache()
    cache.activate_past_recording()
    model(text[:, :100], past_key_values=cache)
    twin = copy.deepcopy(cache)
    first, second = (read(model, one, text[:, 100:], [20]) for one in (cache, twin))
    assert torch.equal(first, second)
    assert cache.slots() == twin.slots()
    assert cache.nbytes() == twin.nbytes()
