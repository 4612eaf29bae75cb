"""What the published budget rules go by, measured: every accumulator against a plain loop in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, Olmo2Config

from kvprofile.calibration.hidden_states import watching_hidden
from kvprofile.calibration.measure.coverage import MassCoverage
from kvprofile.calibration.measure.hidden import AttentionChange
from kvprofile.calibration.measure.window import BINS, WindowAttention, window_attention
from kvprofile.merging.softmax import Softmax
from tests.unit.tiny_models import MODELS, random_model, tiny_model, tiny_text

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 70, 8
SCALING = 0.3


def random_call(seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, HEADS, TOKENS, DIM, generator=generator) * 2,
        torch.randn(1, KV_HEADS, TOKENS, DIM, generator=generator),
    )


def attention_loop(query, key, newest, softcap=None, sinks=None):
    """Attention of the newest queries, `(heads, newest, tokens)`, one query at a time."""
    found = torch.zeros(HEADS, newest, TOKENS, dtype=torch.float64)
    for head in range(HEADS):
        for place in range(newest):
            seen = TOKENS - newest + place + 1
            logits = key[0, head * KV_HEADS // HEADS, :seen].double() @ query[0, head, seen - 1].double() * SCALING
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            aside = 0 if sinks is None else math.exp(sinks[head])
            found[head, place, :seen] = logits.exp() / (logits.exp().sum() + aside)
    return found


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_newest_queries_attention(softcap):
    query, key = random_call(0)
    found = window_attention(query, key, Softmax(SCALING, softcap=softcap))
    assert found.shape == (KV_HEADS, HEADS // KV_HEADS, 32, TOKENS)
    torch.testing.assert_close(
        found.flatten(0, 1).double(), attention_loop(query, key, 32, softcap), atol=1e-6, rtol=1e-5
    )


def test_sinks_take_attention_from_every_token():
    query, key = random_call(0)
    sinks = torch.tensor([0.5, -1.0, 2.0, 3.0])
    found = window_attention(query, key, Softmax(SCALING, sinks=sinks))
    expected = attention_loop(query, key, 32, sinks=sinks.tolist())
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, atol=1e-6, rtol=1e-5)


def test_a_short_text_keeps_tokens_before_its_window():
    query, key = random_call(0)
    assert window_attention(query[:, :, :11], key[:, :, :11], Softmax(SCALING)).shape[2:] == (5, 11)


def test_entropy_variance_and_scores_of_the_window():
    window = WindowAttention(3)
    entropies, variances, scores = [], [], []
    for seed in range(2):
        query, key = random_call(seed)
        window.update(1, window_attention(query, key, Softmax(SCALING)))
        older = attention_loop(query, key, 32)[:, :, : TOKENS - 32].numpy()
        entropies.append(-sum(value * math.log(value) for value in older.ravel()))
        variances.append(
            sum(older[head, :, token].var(ddof=1) for head in range(HEADS) for token in range(TOKENS - 32))
        )
        received = older.sum(axis=1).reshape(KV_HEADS, -1, TOKENS - 32).sum(axis=1)
        for row in received:
            scores += [row[max(0, token - 2) : token + 3].mean() for token in range(TOKENS - 32)]
    found = window.finish()
    assert found["window_entropy"] == pytest.approx([0, np.mean(entropies), 0], rel=1e-5)
    assert found["window_variance"] == pytest.approx([0, np.mean(variances), 0], rel=1e-4)
    histogram = found["window_histogram"]
    assert histogram.sum(axis=1).tolist() == [0, len(scores), 0]
    # Bins are a twentieth of a factor of two wide: at their edges counts from above agree with the scores themselves.
    edges = 2.0 ** (-40 + 52 * np.arange(BINS + 1) / BINS)
    above = np.cumsum(histogram[1][::-1])[::-1]
    expected = [sum(score >= edge * (1 + 1e-4) for score in scores) for edge in edges[:-1]]
    assert np.abs(above - expected).max() <= 1
    assert 0 < above[800] < len(scores)


def test_the_part_of_the_mass_on_the_heaviest_tokens():
    coverage = MassCoverage(2)
    generator = torch.Generator().manual_seed(3)
    masses = [torch.rand(KV_HEADS, 512, generator=generator) ** 8 for _ in range(2)]
    for mass in masses:
        coverage.update(1, mass)
    found = coverage.finish()["mass_coverage"]
    assert not found[0].any()
    for point in (0, 9, 127, 255):
        parts = []
        for mass in masses:
            token_mass = sorted((float(first) + float(second) for first, second in mass.T), reverse=True)
            parts.append(sum(token_mass[: 2 * (point + 1)]) / sum(token_mass))
        assert found[1, point] == pytest.approx(np.mean(parts), rel=1e-5)


def test_workers_add_up_and_nothing_seen_is_nothing_said():
    query, key = random_call(0)
    hidden = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))

    def seen(cls, *updates):
        accumulator = cls(2)
        for update in updates:
            accumulator.update(0, *update)
        return accumulator

    samples = {
        WindowAttention: [(window_attention(query * scale, key, Softmax(SCALING)),) for scale in (1, 2, 3)],
        MassCoverage: [(torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)],
        AttentionChange: [(hidden[0], hidden[1] + shift) for shift in range(3)],
    }
    for cls, updates in samples.items():
        assert cls(2).finish() == {}
        whole, part = seen(cls, *updates), seen(cls, updates[2])
        part.merge(seen(cls, *updates[:2]))
        for name, array in whole.finish().items():
            assert len(array) == 2
            np.testing.assert_allclose(part.finish()[name], array, rtol=1e-6)


# The hidden state around attention.


def test_the_cosine_is_the_mean_over_tokens():
    before, after = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    change = AttentionChange(2)
    change.update(1, before, after)
    expected = np.mean(
        [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(before, after, strict=True)]
    )
    found = change.finish()["attention_cosine"]
    assert found[1] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found[0])


def observed(model):
    """What `watching_hidden` sees in one forward, and no second time."""
    found = {}

    def watch(layer, before, after):
        assert layer not in found
        found[layer] = before, after

    text = tiny_text(30)
    with torch.no_grad(), watching_hidden(model, watch):
        model(text)
        model(tiny_text(40, seed=1))
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in model.modules()
    )  # nothing is left behind
    with torch.no_grad():
        states = model(text, output_hidden_states=True).hidden_states
    return found, states


@pytest.mark.parametrize("name", MODELS)
def test_the_hidden_state_before_and_after_attention(name):
    model = tiny_model(name)
    found, states = observed(model)
    assert sorted(found) == [0, 1]
    for index, (before, after) in found.items():
        layer = model.model.layers[index]
        torch.testing.assert_close(before, states[index][0])
        # Feed what was seen after attention through the rest of the layer: out comes what the next layer reads.
        with torch.no_grad():
            if name == "gemma3":
                rest = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(after)))
            else:
                rest = layer.mlp(layer.post_attention_layernorm(after))
            done = after + rest
            expected = states[index + 1][0]
            torch.testing.assert_close(model.model.norm(done) if index == 1 else done, expected, atol=1e-4, rtol=1e-4)
        assert not torch.equal(before, after)


def test_a_layer_that_norms_after_attention():
    model = random_model(
        Olmo2Config(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    found, states = observed(model)
    layer, (before, after) = model.model.layers[0], found[0]
    torch.testing.assert_close(before, states[0][0])
    with torch.no_grad():
        done = after + layer.post_feedforward_layernorm(layer.mlp(after))
    torch.testing.assert_close(done, states[1][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parallel", [True, False])
def test_attention_beside_the_mlp_shows_nothing(parallel):
    model = random_model(
        GPTNeoXConfig(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_parallel_residual=parallel,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    found, states = observed(model)
    if parallel:
        assert found == {}
        return
    layer, (_, after) = model.gpt_neox.layers[0], found[0]
    with torch.no_grad():
        done = after + layer.mlp(layer.post_attention_layernorm(after))
    torch.testing.assert_close(done, states[1][0], atol=1e-4, rtol=1e-4)
    assert F.cosine_similarity(*found[0], dim=-1).shape == (30,)
