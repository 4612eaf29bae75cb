"""A text longer than the model was made for is told once, in one line, before it is read."""

import warnings

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, Qwen2Config

from kvprofile import KVMerger
from kvprofile.calibration import calibrate as calibration
from kvprofile.errors import KVProfileError
from kvprofile.evaluate import run as evaluation
from kvprofile.models.context_length import ContextLengthWarning, longest_text
from tests.unit.conftest import run, save_tiny_model
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),
        (Qwen2Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),
        (Gemma3TextConfig(max_position_embeddings=32768), 32768),
        (MambaConfig(), None),
    ],
    ids=["llama2", "llama3.1", "yarn", "gemma3", "without positions"],
)
def test_how_long_a_text_may_be(config, tokens):
    assert longest_text(config) == tokens


def read(model, cache, text):
    for part in text.split(5, dim=1):
        model(part, past_key_values=cache)


@torch.no_grad()
def test_a_cache_warns_once_when_it_passes_the_length():
    model = tiny_model(max_position_embeddings=100)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    cache, text = merger.cache(), tiny_text(110)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(text[:, :80], past_key_values=cache)
        model(text[:, 80:100], past_key_values=cache)
    with pytest.warns(ContextLengthWarning, match="has seen 105 tokens, and the model was made for 100") as told:
        read(model, cache, text[:, 100:])
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    """A model for 300 tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=300)


@pytest.fixture(scope="module")
def short_profile(short_model, tiny_text_file):
    path = short_model.parent / "profile.json"
    made = run("calibrate", short_model, "-o", path, "--data", tiny_text_file, "--tokens", 128, *FEW, *SMALL)
    assert made.exit_code == 0, made.output
    return path


FEW = ("--samples", 1, "--held-out", 1)
SMALL = ("--probes", "passages=2,passage_tokens=8,continuation_tokens=16")


def warned(result):
    return [line for line in result.stderr.splitlines() if "made for" in line]


def stop(*_args, **_kwargs):
    raise KVProfileError("reading begins")


@pytest.mark.parametrize("merged", [True, False])
def test_generate(short_model, short_profile, tiny_text_file, merged, monkeypatch):
    profile = ("--profile", short_profile) if merged else ()
    told = run("generate", short_model, "--prompt", "a" * 290, "--max-new-tokens", 20, *profile)
    assert told.exit_code == 0, told.output
    assert warned(told) == [
        "Warning: prompt and answer take up to 310 tokens, and the model was made for 300 (max_position_embeddings): what it "
        "says beyond them cannot be relied on; read a shorter text, or take a model for longer ones"
    ]
    silent = run("generate", short_model, "--prompt", "a" * 290, "--max-new-tokens", 10, *profile)
    assert not warned(silent)
    monkeypatch.setattr(LlamaForCausalLM, "generate", stop)
    before = run("generate", short_model, "--prompt-file", tiny_text_file, *profile)
    assert len(warned(before)) == 1
    assert "reading begins" in before.stderr


def test_calibrate(short_model, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "measure_into", stop)
    size = ("--tokens", 270, *FEW, *SMALL)
    told = run("calibrate", short_model, "-o", tmp_path / "p.json", "--data", tiny_text_file, *size)
    assert len(warned(told)) == 1
    assert "reading begins" in told.stderr


@pytest.mark.parametrize(("tokens", "lines"), [(268, 0), (269, 1)])
def test_a_dry_run(short_model, tokens, lines):
    told = run("calibrate", short_model, "--dry-run", "--tokens", tokens, *FEW, *SMALL)
    assert told.exit_code == 0
    assert len(warned(told)) == lines


@pytest.mark.parametrize("tokens", [100, 101])
def test_evaluate(short_model, short_profile, tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(evaluation, "make_documents", stop)
    monkeypatch.setattr(evaluation, "CONTINUATION", 200)
    size = ("--documents", 1, "--tokens", tokens, "--examples", 0)
    told = run("evaluate", short_model, "--profile", short_profile, *size, "-o", tmp_path / "e.json")
    assert "reading begins" in told.stderr
    assert len(warned(told)) == (tokens > 100)
