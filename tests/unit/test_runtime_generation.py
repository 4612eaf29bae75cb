"""Generation as users run it, against the stock cache where nothing is merged and teacher-forced logits elsewhere."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache
from tests.unit.architectures import build
from tests.unit.merge_reference import read, relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text, uniform_values

OPTIONS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def merging(model: PreTrainedModel) -> KVMerger:
    heads = [head("h2o" if index % 2 else "absorb", share=0.55 + 0.1 * index) for index in range(2)]
    return KVMerger.from_profile(profile_values(model, heads)).attach(model)


@torch.no_grad()
def read_pieces(model: PreTrainedModel, cache: MergedCache, text: Tensor, bounds: list[int]) -> Tensor:
    """Logits of a text read in pieces that end at `bounds`."""
    return torch.cat(
        [model(text[:, low:high], past_key_values=cache).logits for low, high in itertools.pairwise([0, *bounds])],
        dim=1,
    )


def note_crops(cache: MergedCache) -> tuple[list[int], list[int]]:
    """Tokens taken back after every forward, and how many the cache holds then."""
    removed: list[int] = []
    ends: list[int] = []
    crop = cache.crop

    def noting(tokens_to_remove: int) -> None:
        crop(tokens_to_remove)
        removed.append(-tokens_to_remove)
        ends.append(cache.get_seq_length())

    cache.crop = noting  # type: ignore[method-assign]
    return removed, ends


def drafting(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """The options of one way to draft tokens: from the prompt, or by a model that mostly agrees."""
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    assistant = tiny_model()
    assistant.load_state_dict(model.state_dict())
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


@pytest.mark.parametrize("kind", ["prompt lookup", "assisted"])
@torch.no_grad()
def test_drafted_tokens_that_are_rejected_leave_no_trace(kind):
    model = tiny_model()
    text = tiny_text(40).repeat(1, 3)
    merger = merging(model)
    cache = merger.cache()
    removed, ends = note_crops(cache)
    found = model.generate(text, past_key_values=cache, max_new_tokens=90, **OPTIONS, **drafting(model, kind))
    made = found.sequences.shape[1] - text.shape[1]
    assert made == 90
    # Drafted tokens were taken back, and others were kept.
    assert sum(map(bool, removed)) > 5
    assert len(ends) < made
    fresh = merger.cache()
    expected = read_pieces(model, fresh, found.sequences, ends)
    logits = torch.stack(found.logits, dim=1)
    assert relative_error(logits, expected[:, text.shape[1] - 1 :][:, : logits.shape[1]]) < 1e-5
    assert cache.slots() == fresh.slots()
    assert max(cache.slots()[0][0]) < 0.8 * found.sequences.shape[1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assisted"])
@torch.no_grad()
def test_drafted_tokens_with_nothing_merged(name, kind):
    model = tiny_model(name)
    text = tiny_text(20).repeat(1, 3)
    expected = model.generate(
        text, past_key_values=DynamicCache(config=model.config), max_new_tokens=20, do_sample=False
    )
    merger = KVMerger.from_profile(uniform_values(model)).attach(model)
    drafts = {"assistant_model": tiny_model(name)} if kind == "assisted" else drafting(model, kind)
    found = model.generate(text, past_key_values=merger.cache(), max_new_tokens=20, do_sample=False, **drafts)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_cache_goes_on_after_assisted_decoding_within_its_budget():
    model, text = tiny_model(), tiny_text(120)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    cache = merger.cache()
    first = model.generate(text, past_key_values=cache, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
    # transformers leaves the cache waiting for a crop that plain generation never sends.
    second = model.generate(first, past_key_values=cache, max_new_tokens=150, do_sample=False)
    assert second.shape[1] == 290
    assert max(cache.slots()[0][0]) <= 0.5 * 290 + 33


@pytest.mark.parametrize(
    ("name", "removed"), [("Llama", 1), ("Llama", 20), ("Gemma 3", 7), ("Gemma 3n", 7), ("GPT-OSS", 7)]
)
@torch.no_grad()
def test_a_crop_takes_back_the_newest_tokens(name, removed):
    model, text, rest = build(name), tiny_text(150), tiny_text(40, seed=1)
    merger = merging(model)
    shorter, cache = merger.cache(), merger.cache()
    cut = 130 + 20 - removed
    bounds = [100, 110, 120, 130]
    read_pieces(model, shorter, text[:, :cut], [*bounds, cut] if cut > 130 else bounds)
    read_pieces(model, cache, text[:, :130], bounds)
    cache.activate_past_recording()
    model(text[:, 130:], past_key_values=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == shorter.get_seq_length() == cut
    assert cache.slots() == shorter.slots()
    steps = list(range(1, 41))
    expected = read_pieces(model, shorter, rest, steps)
    assert relative_error(read_pieces(model, cache, rest, steps), expected) < 1e-5


@torch.no_grad()
def test_a_crop_beyond_the_tail_is_refused_and_changes_nothing():
    model, text = tiny_model(), tiny_text(120)
    cache = merging(model).cache()
    model(text, past_key_values=cache)
    before = cache.slots()
    cache.crop(0)
    with pytest.raises(KVProfileError, match="cannot take back 33 tokens of a merged cache: all but the newest 32"):
        cache.crop(-33)
    with pytest.raises(KVProfileError, match="crop takes minus the number of tokens"):
        cache.crop(3)
    assert cache.get_seq_length() == 120
    assert cache.slots() == before
    cache.crop(-32)
    assert cache.get_seq_length() == 88


@torch.no_grad()
def test_turns_of_a_conversation_go_on_with_the_same_cache():
    model, text = tiny_model(), tiny_text(100)
    merger = merging(model)
    cache = merger.cache()
    options = {**OPTIONS, "max_new_tokens": 12}
    first = model.generate(text, past_key_values=cache, **options)
    conversation = torch.cat([first.sequences, tiny_text(60, seed=3)], dim=1)
    second = model.generate(conversation, past_key_values=cache, **options)
    # Only the new tokens may be passed too, with the mask of the whole conversation.
    more = tiny_text(50, seed=4)
    twin, whole = copy.deepcopy(cache), torch.cat([second.sequences, more], dim=1)
    third = model.generate(whole, past_key_values=cache, **options)
    again = model.generate(
        whole[:, cache.get_seq_length() - 11 - more.shape[1] - 1 :],
        attention_mask=torch.ones_like(whole),
        past_key_values=twin,
        **options,
    )
    assert relative_error(torch.stack(again.logits), torch.stack(third.logits)) < 1e-6
    bounds = [100, *range(101, 112), 172, *range(173, 184), 234, *range(235, 246)]
    expected = read_pieces(model, merger.cache(), third.sequences, bounds)
    for turn, begin in ((first, 100), (second, 172), (third, 234)):
        logits = torch.stack(turn.logits, dim=1)
        assert relative_error(logits, expected[:, begin - 1 : begin + 11]) < 1e-5
    assert max(cache.slots()[0][0]) < 0.8 * 245


@torch.no_grad()
def test_a_generation_in_pieces_chooses_from_the_logits_of_the_merged_cache():
    model, text = tiny_model(), tiny_text(150)
    merger = merging(model)
    cache = merger.cache()
    found = model.generate(text, past_key_values=cache, max_new_tokens=40, prefill_chunk_size=48, **OPTIONS)
    expected = read(model, merger.cache(), found.sequences[:, :-1], [48, 96, 144, 150])[:, 149:]
    assert relative_error(torch.stack(found.logits, dim=1), expected) < 1e-5
