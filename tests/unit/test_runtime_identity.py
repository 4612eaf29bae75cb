"""At a budget of 1 nothing is merged and every number is the stock cache's, bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from kvprofile import KVMerger
from tests.unit.tiny_models import MODELS, tiny_model, tiny_text, uniform_values

GENERATIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


def keeping_merger(model: PreTrainedModel, mode: str = "exact") -> KVMerger:
    return KVMerger.from_profile(uniform_values(model, mode=mode))


@torch.no_grad()
def logits_of(model: PreTrainedModel, cache: Cache, text: Tensor, cuts: list[int]) -> Tensor:
    """Logits of the text read in pieces that end at `cuts`, then token by token."""
    bounds = [0, *cuts, *range(cuts[-1] + 1, text.shape[1] + 1)]
    pieces = [model(text[:, low:high], past_key_values=cache).logits for low, high in itertools.pairwise(bounds)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def generated(model: PreTrainedModel, cache: Cache, text: Tensor, **options) -> Tensor:
    torch.manual_seed(0)
    return model.generate(text, past_key_values=cache, max_new_tokens=10, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [[70], [1, 40, 41, 75]], ids=["prefill", "chunked"])
def test_logits_are_bit_identical(name, attention, cuts):
    model, text = tiny_model(name, attention=attention), tiny_text(90, batch=2)
    expected = logits_of(model, DynamicCache(config=model.config), text, cuts)
    for mode in ("exact", "threshold"):
        merger = keeping_merger(model, mode).attach(model)
        cache = merger.cache()
        assert torch.equal(logits_of(model, cache, text, cuts), expected)
        assert cache.get_seq_length() == text.shape[1]
        merger.detach()


def test_logits_are_bit_identical_in_half_precision():
    model, text = tiny_model().to(torch.bfloat16), tiny_text(90)
    expected = logits_of(model, DynamicCache(config=model.config), text, [80])
    merger = keeping_merger(model).attach(model)
    assert torch.equal(logits_of(model, merger.cache(), text, [80]), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS.keys())
def test_generate_is_identical(name, attention, options):
    model, text = tiny_model(name, attention=attention), tiny_text(50, batch=3)
    expected = generated(model, DynamicCache(config=model.config), text, **options)
    merger = keeping_merger(model).attach(model)
    assert torch.equal(generated(model, merger.cache(), text, **options), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_is_identical_while_nothing_is_merged(attention):
    model, text = tiny_model(attention=attention), tiny_text(40, batch=2)
    mask = torch.ones_like(text)
    mask[0, :13] = 0
    text = text * mask
    options = {"attention_mask": mask, "do_sample": False}
    expected = generated(model, DynamicCache(config=model.config), text, **options)
    merger = keeping_merger(model).attach(model)
    assert torch.equal(generated(model, merger.cache(), text, **options), expected)


@torch.no_grad()
def test_a_4d_mask_is_identical_while_nothing_is_merged():
    model, text = tiny_model(), tiny_text(20)
    mask = torch.ones(20, 20).tril().bool()
    mask[10:, 3:6] = False
    expected = model(text, attention_mask=mask[None, None], past_key_values=DynamicCache(config=model.config)).logits
    assert not torch.equal(expected, model(text).logits)
    merger = keeping_merger(model).attach(model)
    assert torch.equal(model(text, attention_mask=mask[None, None], past_key_values=merger.cache()).logits, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_attached_model_without_a_merged_cache_is_the_model_itself(name, attention):
    model, text = tiny_model(name, attention=attention), tiny_text(40, batch=2)

    def everything() -> list[Tensor]:
        mask = torch.ones_like(text)
        mask[0, :9] = 0
        with torch.no_grad():
            return [
                model(text, use_cache=False).logits,
                model(text, attention_mask=mask, use_cache=False).logits,
                logits_of(model, DynamicCache(config=model.config), text, [30]),
                logits_of(model, StaticCache(config=model.config, max_cache_len=64), text, [30]),
                model.generate(text, attention_mask=mask, do_sample=False, max_new_tokens=5),
            ]

    before = everything()
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    assert all(map(torch.equal, everything(), before))
    merger.detach()
    assert all(map(torch.equal, everything(), before))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detach_restores_the_implementation(attention):
    model = tiny_model(attention=attention)
    merger = keeping_merger(model)
    assert merger.attach(model) is merger
    assert model.config._attn_implementation != attention
    merger.detach()
    assert model.config._attn_implementation == attention
    merger.detach()
    assert model.config._attn_implementation == attention
    merger.attach(model)
    assert torch.equal(
        logits_of(model, merger.cache(), tiny_text(40), [30]), logits_of(model, DynamicCache(), tiny_text(40), [30])
    )


@pytest.mark.parametrize("first_out", [0, 1], ids=["inner first", "outer first"])
def test_two_mergers_on_one_model(first_out):
    model, text = tiny_model(), tiny_text(130)
    stock = logits_of(model, DynamicCache(config=model.config), text, [110])
    mergers = [keeping_merger(model), KVMerger.from_profile(uniform_values(model, share=0.5))]
    alone = []
    for merger in mergers:
        merger.attach(model)
        alone.append(logits_of(model, merger.cache(), text, [110]))
        merger.detach()
    assert torch.equal(alone[0], stock)
    assert not torch.allclose(alone[1], stock)
    for merger in reversed(mergers):
        merger.attach(model)
    for merger, expected in zip(mergers, alone, strict=True):
        assert torch.equal(logits_of(model, merger.cache(), text, [110]), expected)
    mergers[first_out].detach()
    staying = 1 - first_out
    assert torch.equal(logits_of(model, mergers[staying].cache(), text, [110]), alone[staying])
    mergers[staying].detach()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(model, DynamicCache(config=model.config), text, [110]), stock)


@torch.no_grad()
def test_caches_may_take_turns_on_one_model():
    model, texts = tiny_model(), [tiny_text(140, seed=1), tiny_text(140, seed=2)]
    keeping = keeping_merger(model).attach(model)
    merging = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    makers = [keeping.cache, merging.cache, lambda: DynamicCache(config=model.config)]
    jobs = [(make, text) for make in makers for text in texts]
    expected = [logits_of(model, make(), text, [120]) for make, text in jobs]
    caches = [make() for make, _ in jobs]
    rows: list[list[Tensor]] = [[] for _ in jobs]
    for low, high in itertools.pairwise([0, *range(120, 141)]):
        for row, cache, (_, text) in zip(rows, caches, jobs, strict=True):
            row.append(model(text[:, low:high], past_key_values=cache).logits)
    for row, one in zip(rows, expected, strict=True):
        assert torch.equal(torch.cat(row, dim=1), one)


def test_a_reset_cache_starts_anew():
    model, text = tiny_model(), tiny_text(120)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    cache = merger.cache()
    first = logits_of(model, cache, text, [110])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert torch.equal(logits_of(model, cache, text, [110]), first)
