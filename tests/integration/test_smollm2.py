"""The whole way on a real model: calibrate, plan, generate, and what it does to the answers."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import kvprofile
from kvprofile.errors import UsageError
from kvprofile.merging.counts import slots_of
from kvprofile.runtime.cache import allocated_bytes

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def long_text(smollm2):
    """2,048 tokens that calibration has not seen."""
    documents = kvprofile.load_documents("builtin", seed=99)
    blocks = kvprofile.make_samples(documents, smollm2.tokenizer, samples=1, tokens=2048, held_out=0, seed=99)
    return blocks.calibration[0].context[None]


@torch.inference_mode()
def continued(model, tokens, cache, steps=4):
    """Logits of a prefill's last token and of some greedy steps."""
    rows = [model(tokens, past_key_values=cache, logits_to_keep=1).logits]
    for _ in range(steps):
        rows.append(model(rows[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(rows, dim=1)


def test_the_plan_beats_uniform_shares_on_text_it_has_not_seen(calibrated):
    check = kvprofile.load_profile(calibrated).check
    assert check.exact.fidelity.recall_kl < 0.2 * check.uniform.fidelity.recall_kl
    assert check.exact.achieved.mean == pytest.approx(0.5, abs=1e-3)


def test_every_head_holds_its_share_to_the_slot(smollm2, calibrated, long_text):
    merger = kvprofile.KVMerger.from_profile(calibrated).attach(smollm2.model)
    cache = merger.cache()
    with torch.inference_mode():
        smollm2.model(long_text, past_key_values=cache, logits_to_keep=1)
    merger.detach()
    plan = kvprofile.load_profile(calibrated).plan
    wanted = [slots_of(torch.tensor([head.share for head in layer.heads]), 2048).tolist() for layer in plan.layers]
    assert [rows[0] for rows in cache.slots()] == wanted
    assert np.mean(wanted) / 2048 == pytest.approx(0.5, abs=1e-3)


def test_half_the_budget_is_half_the_memory(smollm2, calibrated, long_text):
    full = DynamicCache(config=smollm2.model.config)
    merger = kvprofile.KVMerger.from_profile(calibrated).attach(smollm2.model)
    cache = merger.cache()
    continued(smollm2.model, long_text, full)
    continued(smollm2.model, long_text, cache)
    merger.detach()
    assert cache.get_seq_length() == full.get_seq_length()
    assert cache.nbytes() <= 0.53 * allocated_bytes(full)


def test_budget_one_changes_no_bit(smollm2, calibrated, long_text):
    profile = kvprofile.load_profile(calibrated)
    everything = kvprofile.replan(profile, kvprofile.load_arrays(profile, calibrated)["damage_mean"], 1.0)
    expected = continued(smollm2.model, long_text, DynamicCache(config=smollm2.model.config))
    merger = kvprofile.KVMerger.from_profile(everything).attach(smollm2.model)
    actual = continued(smollm2.model, long_text, merger.cache())
    merger.detach()
    assert torch.equal(actual, expected)


def test_generate_copies_a_passage_from_a_compressed_context(smollm2, calibrated, long_text):
    """An induction task: the first tokens of a passage from the middle, the model goes on as the passage does."""
    model = smollm2.model
    passage = long_text[:, 900:940]
    prompt = torch.cat([long_text[:, :1024], passage[:, :24]], dim=1)
    merger = kvprofile.KVMerger.from_profile(calibrated).attach(model)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    full = model.generate(prompt, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **arguments)
    merged = model.generate(prompt, attention_mask=mask, past_key_values=merger.cache(), **arguments)
    merger.detach()
    agreement = (full[0, -12:] == merged[0, -12:]).float().mean()
    assert agreement >= 0.75


def test_thresholds_keep_the_budget_on_the_text_they_were_measured_on(smollm2):
    documents = kvprofile.load_documents("builtin")
    samples = kvprofile.make_samples(documents, smollm2.tokenizer, samples=3, tokens=512, held_out=0, continuation=64)
    twice = type(samples)(samples.calibration, samples.calibration, samples.description, samples.digest)
    profile, _ = kvprofile.calibrate(smollm2, twice, budget=0.5, policy="gauss", rule="uniform", mode="threshold")
    # Curves are interpolated between thresholds; nothing else stands between the plan and the slots.
    assert profile.check.threshold.achieved.mean == pytest.approx(0.5, abs=0.004)
    assert profile.check.exact.achieved.mean == pytest.approx(0.5, abs=1e-3)


def test_samples_without_a_continuation_are_refused(smollm2):
    documents = kvprofile.load_documents("builtin")
    samples = kvprofile.make_samples(documents, smollm2.tokenizer, samples=1, tokens=64, held_out=0)
    with pytest.raises(UsageError, match="make the samples with continuation"):
        kvprofile.calibrate(smollm2, samples)
