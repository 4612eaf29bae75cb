"""What `benchmarks/bytes.py` holds plans against: each rival's numbers and bytes by a plain loop."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvprofile.codecs.table import CODECS
from kvprofile.evaluate.rows import digest
from tests.unit.tiny_models import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def whole_cache(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shared import whole_cache

    return whole_cache


def keys(tokens=100, heads=2, dim=64):
    return torch.randn(1, heads, tokens, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, dim)


def grouped(numbers, bits):
    """One group's numbers read back."""
    low, high = np.float16(min(numbers)), max(numbers)
    scale = np.float16((high - float(low)) / (2**bits - 1))
    codes = [min(max(round((x - float(low)) / float(scale)), 0), 2**bits - 1) for x in numbers]
    return [code * float(scale) + float(low) for code in codes]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups_keys_by_channel_and_values_by_token(whole_cache, bits):
    given = keys()
    read, size = whole_cache.per_channel(bits)(given)
    for head, channel in product(range(2), (0, 17, 63)):
        expected = []
        for begin in (0, 32, 64):
            expected += grouped(given[0, head, begin : begin + 32, channel].tolist(), bits)
        expected += given[0, head, 96:, channel].tolist()  # fill no group
        np.testing.assert_allclose(read[0, head, :, channel], expected, rtol=1e-5, atol=1e-5)
    assert size == 2 * 64 * (3 * (32 * bits / 8 + 4) + 4 * 2)
    read, size = whole_cache.per_token(bits)(given)
    for head, token in product(range(2), (0, 50, 99)):
        row = given[0, head, token].tolist()
        expected = grouped(row[:32], bits) + grouped(row[32:], bits)
        np.testing.assert_allclose(read[0, head, token], expected, rtol=1e-5, atol=1e-5)
    assert size == 2 * 100 * 2 * (32 * bits / 8 + 4)


def test_a_rival_keeps_the_first_and_newest_tokens_and_counts_them(whole_cache):
    model = tiny_model(head_dim=32)
    full = DynamicCache(config=model.config)
    ids = torch.arange(90)[None] % model.config.vocab_size
    with torch.inference_mode():
        model(ids, past_key_values=full)
    before = [layer.keys.clone() for layer in full.layers]
    heads, dim = full.layers[0].keys.shape[1], full.layers[0].keys.shape[-1]
    for rival in whole_cache.rivals_of(model.config):
        held, size = rival.hold(full)
        for layer, kept in zip(full.layers, before, strict=True):
            assert torch.equal(layer.keys, kept)
        if rival.name.startswith("transformers"):
            continue
        for layer, stock in zip(held.layers, full.layers, strict=True):
            for kept in (slice(None, 4), slice(-32, None)):
                assert torch.equal(layer.keys[:, :, kept], stock.keys[:, :, kept])
                assert torch.equal(layer.values[:, :, kept], stock.values[:, :, kept])
            assert not torch.equal(layer.keys, stock.keys)
        if rival.name.startswith("TurboQuant"):
            turbo = CODECS[f"turbo{rival.name[-1]}"].nbytes(dim)
            assert size == len(full.layers) * 2 * heads * (54 * turbo + 36 * 2 * dim)
        with torch.inference_mode():
            model(ids[:, :5], past_key_values=held)
        assert held.get_seq_length() == 95


def test_no_rival_takes_another_s_finished_rows(whole_cache):
    from shared.ways import of_rival

    rivals = whole_cache.rivals_of(tiny_model().config)
    assert len({digest(of_rival(rival).settings) for rival in rivals}) == len(rivals)


def test_bits_are_those_of_the_least_damage_that_fits(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shared import kvtuner

    generator = np.random.default_rng(0)
    damage = generator.random((2, 2, 1)) * np.array([0.001, 0.1, 1.0])
    every = [np.array(places).reshape(2, 2) for places in product(range(3), repeat=4)]
    bits = np.array(kvtuner.BITS)

    def lost(places):
        return np.take_along_axis(damage, places[..., None], -1).sum()

    for mean in (8, 6, 5, 4, 3.25, 2):
        chosen = kvtuner.choose(damage, mean)
        spent = bits[chosen].mean()
        assert spent <= mean
        # Nothing that takes no more is better.
        assert lost(chosen) <= min(lost(places) for places in every if bits[places].mean() <= spent) + 1e-12
