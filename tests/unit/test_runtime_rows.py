"""Batches, beams and copies of a merged cache: every row is what it would be alone."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprofile import KVMerger
from kvprofile.runtime.cache import MergedCache
from tests.unit.merge_reference import read, relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

PROMPT, DECODED = 112, 45  # the tail is merged again while decoding
POLICY_PAIRS = [("gauss", "h2o"), ("snapkv", "pivot"), ("average", "streaming")]


def merging(model: PreTrainedModel, policies: tuple[str, str], mode: str = "exact") -> KVMerger:
    epsilons = {"gauss": 0.05, "average": 0.05, "pivot": -5.0, "h2o": -0.5, "snapkv": -0.5, "streaming": 0.5}
    shares = (0.6, 0.75)
    heads = [head(name, epsilon=epsilons[name], share=share) for name, share in zip(policies, shares, strict=True)]
    return KVMerger.from_profile(profile_values(model, heads, mode=mode)).attach(model)


@torch.no_grad()
def continued(model: PreTrainedModel, cache: MergedCache, text: Tensor) -> Tensor:
    return torch.cat([model(token, past_key_values=cache).logits for token in text.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("mode", ["exact", "threshold"])
@pytest.mark.parametrize("policies", POLICY_PAIRS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_rows_of_a_batch_equal_the_rows_alone(name, policies, mode):
    model, text = tiny_model(name), tiny_text(PROMPT + DECODED, batch=3)
    merger = merging(model, policies, mode)
    together_cache = merger.cache()
    together = read(model, together_cache, text, [PROMPT])
    for index in range(3):
        cache = merger.cache()
        assert relative_error(together[index], read(model, cache, text[index : index + 1], [PROMPT])[0]) < 1e-5
        assert [layer[index] for layer in together_cache.slots()] == [layer[0] for layer in cache.slots()]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_rearranged_rows_go_on_as_rows_alone(name, change, rows):
    model = tiny_model(name)
    prompts, rest = tiny_text(PROMPT + 5, batch=3), tiny_text(DECODED, batch=len(rows), seed=1)
    merger = merging(model, POLICY_PAIRS[0])
    cache = merger.cache()
    read(model, cache, prompts, [PROMPT])
    change(cache)
    together = continued(model, cache, rest)
    for place, row in enumerate(rows):
        alone = merger.cache()
        read(model, alone, prompts[row : row + 1], [PROMPT])
        assert relative_error(together[place], continued(model, alone, rest[place : place + 1])[0]) < 1e-5
        assert [layer[place] for layer in cache.slots()] == [layer[0] for layer in alone.slots()]


@torch.no_grad()
def test_rows_may_be_rearranged_before_anything_is_stored_or_merged():
    model, text = tiny_model(), tiny_text(50, batch=2)
    merger = merging(model, POLICY_PAIRS[0])
    cache = merger.cache()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    read(model, cache, text[:, :40], [40])
    cache.batch_select_indices(torch.tensor([1]))
    expected = read(model, merger.cache(), text[1:], [40])[:, 40:]
    assert relative_error(continued(model, cache, text[1:, 40:]), expected) < 1e-5


@pytest.mark.parametrize("policies", POLICY_PAIRS, ids=str)
@torch.no_grad()
def test_the_score_of_a_beam_is_its_log_probability(policies):
    model, text = tiny_model(), tiny_text(PROMPT, batch=2)
    merger = merging(model, policies)
    options = {"do_sample": False, "num_beams": 3, "length_penalty": 0.0, "max_new_tokens": DECODED}
    cache = merger.cache()
    found = model.generate(
        text, past_key_values=cache, output_scores=True, return_dict_in_generate=True, pad_token_id=0, **options
    )
    assert max(max(layer[0]) for layer in cache.slots()) < 0.9 * found.sequences.shape[1]
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        logits = read(model, merger.cache(), sequence[None, :-1], [PROMPT])[0, PROMPT - 1 :]
        chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, sequence[PROMPT:, None])
        assert float(chosen.sum()) == pytest.approx(float(score), abs=1e-3)


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 2}, {"do_sample": False}], ids=str)
@torch.no_grad()
def test_generate_chooses_from_the_logits_of_the_merged_cache(options):
    model, text = tiny_model(), tiny_text(PROMPT, batch=2)
    merger = merging(model, POLICY_PAIRS[0])
    torch.manual_seed(0)
    found = model.generate(
        text,
        past_key_values=merger.cache(),
        max_new_tokens=DECODED,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    expected = read(model, merger.cache(), found.sequences[:, :-1], [PROMPT])[:, PROMPT - 1 :]
    assert relative_error(torch.stack(found.logits, dim=1), expected) < 1e-5


@pytest.mark.parametrize("tokens", [40, PROMPT], ids=["unmerged", "merged"])
@torch.no_grad()
def test_a_copy_goes_on_by_itself(tokens):
    model, text = tiny_model(), tiny_text(tokens + DECODED)
    merger = merging(model, POLICY_PAIRS[0])
    cache = merger.cache()
    model(text[:, :tokens], past_key_values=cache)
    twin = copy.deepcopy(cache)
    first = continued(model, twin, text[:, tokens:])
    assert cache.get_seq_length() == tokens
    assert twin.get_seq_length() == tokens + DECODED
    assert torch.equal(continued(model, cache, text[:, tokens:]), first)


@torch.no_grad()
def test_a_text_read_in_inference_mode_goes_on_outside_of_it():
    model, text = tiny_model(), tiny_text(PROMPT + DECODED)
    merger = merging(model, POLICY_PAIRS[0])
    expected = read(model, merger.cache(), text, [PROMPT])
    cache = merger.cache()
    with torch.inference_mode():
        first = read(model, cache, text[:, : PROMPT + 5], [PROMPT])
    rest = continued(model, cache, text[:, PROMPT + 5 :])
    assert torch.equal(torch.cat([first, rest], dim=1), expected)
