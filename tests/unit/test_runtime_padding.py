"""Prompts of different lengths in one batch, padded on the left: every row is what it would be alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprofile import KVMerger
from kvprofile.runtime.cache import MergedCache
from tests.unit.builders import slots_in
from tests.unit.merge_reference import relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text, uniform_values

LENGTHS = (118, 90, 40)
DECODED = 36  # the shortest row is merged for the first time long after the others, which are merged again
THRESHOLDS = {"gauss": 0.05, "absorb": -0.6, "h2o": -0.5, "snapkv": -0.7, "streaming": 0.5, "kvmerger": 0.05}


def merging(model: PreTrainedModel, policies: tuple[str, str], mode: str = "exact") -> KVMerger:
    heads = [
        head(name, epsilon=THRESHOLDS[name], share=share) for name, share in zip(policies, (0.55, 0.7), strict=True)
    ]
    return KVMerger.from_profile(profile_values(model, heads, mode=mode)).attach(model)


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts `(1, tokens)` as one batch with its mask."""
    longest = max(text.shape[1] for text in texts)
    rows = [torch.nn.functional.pad(text, (longest - text.shape[1], 0)) for text in texts]
    mask = torch.stack([torch.arange(longest) >= longest - text.shape[1] for text in texts]).long()
    return torch.cat(rows), mask


@torch.no_grad()
def read_padded(
    model: PreTrainedModel, cache: MergedCache, text: Tensor, mask: Tensor, cuts: list[int]
) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """Logits of a padded batch read in pieces that end at `cuts`, then token by token; the slots after every piece."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits, slots = [], []
    for low, high in itertools.pairwise([0, *cuts, *range(cuts[-1] + 1, text.shape[1] + 1)]):
        logits.append(
            model(
                text[:, low:high],
                attention_mask=mask[:, :high],
                position_ids=positions[:, low:high],
                past_key_values=cache,
            ).logits
        )
        slots.append(cache.slots())
    return torch.cat(logits, dim=1), slots


def rows_equal_rows_alone(
    model: PreTrainedModel,
    merger: KVMerger,
    lengths: tuple[int, ...],
    cuts: list[int] | None = None,
    decoded: int = DECODED,
) -> None:
    """Read rows of these prompt lengths together and alone, the alone ones cut where the batch is cut."""
    texts = [tiny_text(length + decoded, seed=seed) for seed, length in enumerate(lengths)]
    text, mask = padded(texts)
    cuts = cuts or [max(lengths)]
    together, slots = read_padded(model, merger.cache(), text, mask, cuts)
    sliding = {index for index, kind in enumerate(merger.settings.facts["attention"]) if kind != "full_attention"}
    for row, alone in enumerate(texts):
        padding = text.shape[1] - alone.shape[1]
        own_cuts = [cut - padding for cut in cuts if cut > padding]
        expected, expected_slots = read_padded(
            model, merger.cache(), alone, torch.ones_like(alone), own_cuts or [cuts[-1] - padding]
        )
        assert relative_error(together[row, padding:], expected[0]) < 2e-5
        for found, wanted in zip(slots[-len(expected_slots) :], expected_slots, strict=True):
            for layer in range(len(found)):
                if layer not in sliding:
                    assert found[layer][row] == wanted[layer][0]
        merged_slots = [layer[row] for index, layer in enumerate(slots[-1]) if index not in sliding]
        assert max(map(max, merged_slots)) < 0.95 * alone.shape[1]


@pytest.mark.parametrize("mode", ["exact", "threshold"])
@pytest.mark.parametrize("policies", [("gauss", "h2o"), ("snapkv", "absorb"), ("kvmerger", "streaming")], ids=str)
def test_rows_of_different_lengths_equal_the_rows_alone(policies, mode):
    model = tiny_model()
    rows_equal_rows_alone(model, merging(model, policies, mode), LENGTHS)


@pytest.mark.parametrize(("name", "attention"), [("qwen3", "eager"), ("gemma3", "sdpa")])
def test_rows_equal_rows_alone_in_other_models(name, attention):
    model = tiny_model(name, attention=attention)
    rows_equal_rows_alone(model, merging(model, ("gauss", "snapkv")), LENGTHS)


@pytest.mark.parametrize(
    ("cuts", "policies"),
    [
        ([32, 64, 96, 118], ("gauss", "h2o")),
        ([1, 100, 118], ("snapkv", "absorb")),
        ([16, 33, 118], ("gauss", "snapkv")),
    ],
    ids=str,
)
def test_a_padded_prompt_read_in_pieces(policies, cuts):
    model = tiny_model()
    # The padding of the shorter rows is longer than the first pieces, and ends in the middle of others.
    rows_equal_rows_alone(model, merging(model, policies), LENGTHS, cuts)


def test_a_protected_share_follows_the_rows_own_length():
    model = tiny_model()
    plan = uniform_values(model, share=0.6)
    plan["policies"]["gauss"]["protection"] = {"first": 3, "recent": 10, "recent_share": 0.3, "heavy_share": 0.1}
    rows_equal_rows_alone(model, KVMerger.from_profile(plan).attach(model), LENGTHS)


@torch.no_grad()
def test_the_first_tokens_of_the_text_are_protected_not_the_padding():
    model = tiny_model()
    # Every cosine is at least -1: all but the first 4 and the newest 32 tokens become one slot.
    plan = profile_values(model, [head(epsilon=-1.0)] * 2, mode="threshold")
    cache = KVMerger.from_profile(plan).attach(model).cache()
    text, mask = padded([tiny_text(100), tiny_text(80, seed=1)])
    model(text, attention_mask=mask, past_key_values=cache)
    assert cache.slots() == [[[4 + 1 + 32] * 2] * 2] * 2
    sizes = slots_in(cache.layers[0].state).bias.exp().round().long().tolist()
    assert sizes == [1, 1, 1, 1, 64] * 2 + [1, 1, 1, 1, 44] * 2


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 32}, {"num_beams": 3}], ids=str)
@torch.no_grad()
def test_generate_gives_each_prompt_its_own_answer(options: dict[str, Any]):
    model = tiny_model()
    merger = merging(model, ("gauss", "h2o"))
    # Prompts a whole number of pieces apart, so that pieces end at the same tokens alone.
    texts = [tiny_text(length, seed=seed) for seed, length in enumerate((128, 96, 32))]
    text, mask = padded(texts)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(text, attention_mask=mask, past_key_values=merger.cache(), **options)
    for row, alone in enumerate(texts):
        expected = model.generate(alone, past_key_values=merger.cache(), **options)
        assert torch.equal(together[row, text.shape[1] :], expected[0, alone.shape[1] :])


@torch.no_grad()
def test_rows_of_a_padded_batch_may_be_rearranged():
    model = tiny_model()
    merger = merging(model, ("gauss", "h2o"))
    texts = [tiny_text(length, seed=seed) for seed, length in enumerate(LENGTHS)]
    text, mask = padded(texts)
    order, cache = [2, 0, 0], merger.cache()
    read_padded(model, cache, text, mask, [text.shape[1]])
    before = cache.slots()
    cache.reorder_cache(torch.tensor(order))
    assert cache.slots() == [[layer[row] for row in order] for layer in before]
    rest = tiny_text(DECODED, batch=3, seed=9)
    full_mask = torch.cat([mask[order], torch.ones_like(rest)], dim=1)
    positions = full_mask.cumsum(-1) - 1
    for step in range(DECODED):
        seen = text.shape[1] + step + 1
        logits = model(
            rest[:, step : step + 1],
            attention_mask=full_mask[:, :seen],
            position_ids=positions[:, seen - 1 : seen],
            past_key_values=cache,
        ).logits
    for place, row in enumerate(order):
        whole = torch.cat([texts[row], rest[place : place + 1]], dim=1)
        alone = merger.cache()
        expected, _ = read_padded(model, alone, whole, torch.ones_like(whole), [texts[row].shape[1]])
        assert relative_error(logits[place, -1], expected[0, -1]) < 2e-5
        assert [layer[place] for layer in cache.slots()] == [layer[0] for layer in alone.slots()]
