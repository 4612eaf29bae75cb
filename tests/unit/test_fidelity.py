"""Distances against scipy, probes that are what they say, and readings equal to a plain forward."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor
from transformers import DynamicCache

from kvprofile import KVMerger
from kvprofile.evaluate.fidelity import PASSAGE_TOKENS, PASSAGES, Trial, distance, make_trial, read_through
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values


def random_rows(seed: int, tokens: int = 37, vocabulary: int = 53) -> Tensor:
    logits = np.random.default_rng(seed).normal(scale=3, size=(tokens, vocabulary))
    return torch.from_numpy(log_softmax(logits, axis=-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distance_equals_scipy(dtype):
    reference, candidate = random_rows(0), random_rows(1)
    candidate[:20] = reference[:20] + 0.1 * candidate[:20]
    candidate = torch.log_softmax(candidate, dim=-1)
    found = distance(reference.to(dtype), candidate.to(dtype))
    entropies = rel_entr(reference.exp().numpy(), candidate.exp().numpy()).sum(-1)
    same = reference.numpy().argmax(-1) == candidate.numpy().argmax(-1)
    assert found.kl == pytest.approx(entropies.mean(), rel=1e-5)
    assert found.top1 == pytest.approx(same.mean())
    assert 0 < found.top1 < 1


def test_distance_is_from_the_first_to_the_second():
    reference = torch.tensor([[0.9, 0.1]]).log()
    candidate = torch.tensor([[0.5, 0.5]]).log()
    assert distance(reference, candidate).kl == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), rel=1e-5)
    assert distance(candidate, reference).kl == pytest.approx(0.5 * np.log(5 / 9) + 0.5 * np.log(5), rel=1e-5)


def test_identical_distributions():
    rows = random_rows(0)
    found = distance(rows, rows.clone())
    assert (found.kl, found.top1) == (0.0, 1.0)
    # Rounding may make the sum a little negative; a distance is not.
    assert 0 <= distance(rows.float(), rows.float() + 1e-7).kl < 1e-5


def test_impossible_tokens():
    reference = torch.tensor([[0.75, 0.25, 0.0]]).log()
    candidate = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert distance(reference, candidate).kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert distance(torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[1.0, 0.0, 0.0]]).log()).kl == np.inf


def test_broken_logits_are_not_a_small_distance():
    reference, candidate = random_rows(0), random_rows(1)
    candidate[5] = torch.nan
    assert not distance(reference, candidate).kl < 1e9


@pytest.mark.parametrize("tokens", [1000, 2048, 4 * PASSAGE_TOKENS, 101, 7])
@pytest.mark.parametrize("seed", range(5))
def test_passages_come_from_the_quarters_of_the_context(tokens, seed):
    context, continuation = torch.arange(tokens) * 3, torch.arange(50)
    trial = make_trial(context, continuation, seed)
    assert torch.equal(trial.context, context)
    assert torch.equal(trial.continuation, continuation)
    length = min(PASSAGE_TOKENS, tokens // PASSAGES)
    passages = (trial.recall // 3).split(length)
    assert len(passages) == PASSAGES == 4
    for part, passage in enumerate(passages):
        start = int(passage[0])
        assert torch.equal(passage, torch.arange(start, start + length))
        assert part * (tokens // PASSAGES) <= start
        assert start + length <= (part + 1) * (tokens // PASSAGES)


def test_places_are_drawn_by_the_seed_alone():
    context, continuation = torch.arange(1000), torch.arange(50)
    draws = [make_trial(context, continuation, seed).recall for seed in (0, 0, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[2], draws[3])
    starts = {int(make_trial(context, continuation, seed).recall[0]) for seed in range(400)}
    # The first and the last possible place of the first quarter are drawn sooner or later, and none beyond.
    assert min(starts) < 5
    assert 250 - PASSAGE_TOKENS - 5 < max(starts) <= 250 - PASSAGE_TOKENS


@pytest.fixture(scope="module")
def trial() -> Trial:
    text = tiny_text(260)[0]
    return make_trial(text[:220], text[220:], seed=0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_reading_with_the_stock_cache_equals_one_forward(name, trial):
    model = tiny_model(name)
    recall, continuation = read_through(model, DynamicCache(config=model.config), trial)
    for rows, read in ((recall, trial.recall), (continuation, trial.continuation)):
        logits = model(torch.cat([trial.context, read])[None]).logits[0, len(trial.context) :]
        expected = log_softmax(logits.double().numpy(), axis=-1)
        assert rows.shape == (len(read), model.config.vocab_size)
        np.testing.assert_allclose(rows.numpy(), expected, atol=2e-4)
        np.testing.assert_allclose(np.exp(rows.numpy()), np.exp(expected), atol=1e-5)


@torch.no_grad()
def test_reading_leaves_the_filled_cache_as_it_was(trial):
    model = tiny_model()
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    cache = merger.cache()
    seen = []

    def after_context(filled) -> None:
        assert filled is cache
        seen.append((filled.get_seq_length(), filled.slots()))

    rows = read_through(model, cache, trial, after_context)
    assert seen == [(220, [[[110, 110]]] * 2)]
    assert (cache.get_seq_length(), cache.slots()) == seen[0]
    again = read_through(model, merger.cache(), trial)
    assert all(map(torch.equal, rows, again))


@torch.no_grad()
def test_a_merged_cache_is_further_than_a_kept_one(trial):
    model = tiny_model()
    reference = read_through(model, DynamicCache(config=model.config), trial)
    distances = []
    for share in (1.0, 0.5):
        merger = KVMerger.from_profile(uniform_values(model, share=share)).attach(model)
        rows = read_through(model, merger.cache(), trial)
        distances.append([distance(full, merged) for full, merged in zip(reference, rows, strict=True)])
        merger.detach()
    kept, merged = distances
    assert [(one.kl, one.top1) for one in kept] == [(0.0, 1.0)] * 2
    assert all(one.kl > 0.01 for one in merged)
    assert all(one.top1 < 1 for one in merged)
