"""`kvprofile fit`: its arithmetic against caches that were filled, and what it solves for against a search by trying all."""

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvprofile import KVMerger, load_profile
from kvprofile.errors import UsageError
from kvprofile.planning.fit import Footprint, Target, fit, footprint_of
from kvprofile.quantities import parse_count, parse_size
from kvprofile.runtime.cache import allocated_bytes
from tests.unit.architectures import build
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.tiny_models import VOCAB, head, profile_values, tiny_model

MODELS = {
    "Llama": tiny_model,
    "seven query heads a KV head": lambda: tiny_model(num_attention_heads=14, num_key_value_heads=2, hidden_size=224),
    "Gemma 3": lambda: build("Gemma 3", max_position_embeddings=2048),  # most layers have a window
    "Gemma 2": lambda: build("Gemma 2", max_position_embeddings=2048),
}


def filled(model, cache, tokens, batch):
    text = torch.randint(1, VOCAB, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece in (text[:, :-1], text[:, -1:]):
            model(piece, past_key_values=cache, logits_to_keep=1)
    return allocated_bytes(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_as_large_as_it_says(name, dtype):
    model = MODELS[name]().to(dtype)
    footprint = footprint_of(model.config, dtype)
    assert footprint.weights == sum(weight.nbytes for weight in model.parameters())
    shares = [0.25 + 0.5 * place / footprint.kv_heads for place in range(footprint.kv_heads)]
    heads = [head("streaming", epsilon=0.5, share=share) for share in shares]
    merger = KVMerger.from_profile(profile_values(model, heads)).attach(model)
    for tokens, batch in ((512, 1), (700, 2)):
        said = footprint.merged_bytes(tokens, batch, np.array([shares] * footprint.merged))
        assert said == pytest.approx(filled(model, merger.cache(), tokens, batch), rel=0.02)
        said = footprint.stock_bytes(tokens, batch)
        assert said == pytest.approx(filled(model, DynamicCache(config=model.config), tokens, batch), rel=0.02)


FOOTPRINT = Footprint(10_000_000, 2, 3000, 4000, ("full_attention",) * 3 + ("sliding_attention",), 128, 2, 16, 4096)


@pytest.mark.parametrize("memory", [11_000_000, 11_300_000, 12_000_000, 14_000_000, 30_000_000])
def test_the_largest_of_everything_is_found(memory):
    target = Target(memory, context=2000, batch=2, reserve=500_000, piece=100)
    found = fit(FOOTPRINT, target)

    def fits(budget, context=2000, batch=2):
        rest = memory - 500_000 - FOOTPRINT.weights - FOOTPRINT.activations(min(100, context), batch)
        even = np.full((3, 2), budget)
        stock = FOOTPRINT.stock_bytes(context, batch)
        return rest >= (stock if budget == 1 else FOOTPRINT.merged_bytes(context, batch, even))

    works = [step / 1000 for step in range(18, 1001) if fits(step / 1000)]
    assert found.budget == (max(works) if works else None)
    assert (found.cache <= found.left) if works else (found.needed > found.left)
    for room in found.rooms:
        for name in ("context", "batch"):
            largest = getattr(room, name)
            assert not largest or fits(room.budget, **{name: largest})
            assert not fits(room.budget, **{name: largest + 1})


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen2.5-7b", "gemma2-2b", "phi3-mini"])
def test_aliases_need_no_network_and_no_weights(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("fit", name, "--memory", "24GB", "--context", "32k", "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["dtype"] == "bfloat16"
    assert told["predicted_kl"] is None
    assert 0 < told["budget"] <= 1
    assert told["weights"] + told["activations"] + told["reserve"] + told["cache"] <= told["memory"] == 24 * 10**9
    assert [room["budget"] for room in told["rooms"]] == [1, 0.75, 0.5, 0.25]


def test_a_profile_predicts_what_its_plan_would(tiny_folder, tiny_profile, tmp_path):
    ample = ("--memory", "1GB", "--context", 512, "--batch", 2, "--dtype", "float32", "--reserve", "1kB")
    told = json.loads(run("fit", tiny_folder, *ample, "--json").stdout)
    assert told["budget"] == 1
    half = told["weights"] + told["activations"] + told["reserve"] + told["full"] // 2
    size = ("--memory", half, *ample[2:])
    result = run("fit", tiny_folder, *size, "--profile", tiny_profile, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert 0.1 < told["budget"] < 1
    assert run("plan", tiny_profile, "--budget", told["budget"], "-o", tmp_path / "p.json").exit_code == 0
    assert told["predicted_kl"] == pytest.approx(load_profile(tmp_path / "p.json").plan.predicted_damage)
    shown = run("fit", tiny_folder, *size, "--profile", tiny_profile).stdout
    assert f"budget {told['budget']:.3f}" in shown
    assert f"kvprofile plan {tiny_profile} --budget {told['budget']:.3f}" in shown
    without = run("fit", tiny_folder, *size).stdout
    assert "No profile yet" in without


def test_what_cannot_be_is_refused(tiny_folder, tiny_profile, tmp_path):
    size = ("--memory", "24GB", "--context", "32k")
    refused(run("fit", "smolm2-135m", *size), 2, "unknown model 'smolm2-135m'")
    refused(run("fit", tiny_folder, "--memory", "many", "--context", "32k"), 2, "'many' is no size")
    refused(run("fit", tiny_folder, "--memory", "24GB", "--context", "long"), 2, "'long' is no number of tokens")
    refused(run("fit", "smollm2-135m", *size, "--profile", tiny_profile), 3, "was made for tiny")
    result = run("fit", tiny_folder, "--memory", "1MB", "--context", "32k")
    assert result.exit_code == 3
    assert "no budget fits" in result.stderr
    assert "No profile yet" not in result.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9),
        ("24 gb", 24e9),
        ("80G", 80e9),
        ("24GiB", 24 * 2**30),
        ("1.5 MiB", 1.5 * 2**20),
        ("1,000", 1000),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "count"), [("32k", 32768), ("128K", 131072), ("4,096", 4096), ("1.5k", 1536), ("1m", 2**20)]
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3", "24 XB", "0", "1e9", "nan", "0x10"])
def test_what_is_neither(text):
    for parse in (parse_size, parse_count):
        with pytest.raises(UsageError, match="; expected for example"):
            parse(text)
