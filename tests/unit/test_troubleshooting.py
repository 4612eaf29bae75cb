"""docs/troubleshooting.md shows commands and what they say: every one is run here, and has to say just that."""

import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import MambaConfig, MambaForCausalLM

from kvprofile import KVMerger, load_arrays, load_model, load_profile, save_profile
from kvprofile.calibration.partials import partial_path
from kvprofile.errors import KVProfileError
from tests.unit.conftest import run, save_tiny_model
from tests.unit.test_models import http_error
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
BLOCK = re.compile(r"```console\n\$ (?P<command>.+)\n(?P<error>.+)\n```\n\nExit code (?P<code>\d)\. ")
SHOWN = [match.groupdict() for match in BLOCK.finditer(PAGE.read_text())]


def _gated(*_args, **_kwargs):
    raise http_error(errors.GatedRepoError, 403)


def _without_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _silent(*_args, **_kwargs):
    raise ConnectionError("no answer in 5 s")


def _no_memory_at_all(*_args, **_kwargs):
    raise MemoryError


def _quantised(*args, **kwargs):
    own = load_model(*args, **kwargs)
    quantize_(own.model, Int8DynamicActivationInt8WeightConfig())
    return own


@pytest.fixture
def world(tiny_folder, tiny_profile, tmp_path, monkeypatch):
    """A folder with all the mistakes of the page in it, no CUDA device, and no network."""
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    shutil.copytree(tiny_folder, tmp_path / "my-model-int8")
    save_tiny_model(tmp_path / "other-model", num_key_value_heads=4)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "model.gguf").write_bytes(b"GGUF")
    shutil.copytree(tiny_folder, tmp_path / "old-model")
    (tmp_path / "old-model" / "model.safetensors").rename(tmp_path / "old-model" / "pytorch_model.bin")
    (tmp_path / "notes.txt").write_text("Not much to read here. " * 20)
    (tmp_path / "long.txt").write_text(" ".join(f"Sentence {number} is the next." for number in range(600)))
    (tmp_path / "latin1.txt").write_bytes("Grüße aus Zürich. ".encode("latin-1") * 20)
    (tmp_path / "table.csv").write_text("title,body\na,b\n")
    profile = load_profile(tiny_profile)
    save_profile(profile, load_arrays(profile, tiny_profile), tmp_path / "profile.json")
    (tmp_path / "copied").mkdir()
    shutil.copy(tmp_path / "profile.json", tmp_path / "copied")
    shutil.copytree(tmp_path / "copied", tmp_path / "mixed")
    (tmp_path / "mixed" / "profile.safetensors").write_bytes(b"another profile's")
    values = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "newer.json").write_text(json.dumps({**values, "schema_version": 3}))
    plan = {**values["plan"], "budget": 1.5}
    (tmp_path / "edited.json").write_text(json.dumps({**values, "plan": plan}))
    partial_path(tmp_path / "started.json").mkdir()
    (partial_path(tmp_path / "started.json") / "sample-00001.safetensors").write_bytes(b"some statistics")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("shown", SHOWN, ids=[entry["command"] for entry in SHOWN])
def test_the_page_says_what_the_command_says(shown, world, monkeypatch):
    words = shlex.split(shown["command"])
    if "=" in words[0]:
        assert words.pop(0) == "HF_HUB_OFFLINE=1"
    elif "meta-llama" in shown["command"]:
        monkeypatch.setattr("huggingface_hub.resolve_revision", _gated)
    elif "HuggingFaceTB/SmolLM2-1.7B" in words:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.resolve_revision", _silent)
    elif "1024" in words:
        monkeypatch.setattr("kvprofile.models.load.load_model", _no_memory_at_all)
    elif "long.txt" in words:
        monkeypatch.setattr("kvprofile.calibration.measuring.read_probe", _without_memory)
    if "my-model-int8" in words:
        monkeypatch.setattr("kvprofile.models.load.load_model", _quantised)
    assert words.pop(0) == "kvprofile"
    before = sorted(Path().rglob("*"))
    result = run(*words)
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert told == [shown["error"]]
    assert result.exit_code == int(shown["code"])
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before  # nothing was written


def _used(model, text, **options):
    """A call of a model with a cache of an attached merger that has seen the first 80 tokens of a text."""
    cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
    model(text[:, :80], past_key_values=cache)
    return lambda: model(text[:, 80:], past_key_values=cache, **options)


def _padded(model, text):
    mask = torch.ones_like(text)
    mask[:, -8:] = 0
    cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
    return lambda: model(text, attention_mask=mask, past_key_values=cache)


def _detached(model, text):
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    cache = merger.cache()
    merger.detach()
    return lambda: model(text, past_key_values=cache)


def _generating(pick, **options):
    def prepare(model, text):
        cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
        options.update(past_key_values=cache, max_new_tokens=1, do_sample=False)
        model.generate(text[:, :80], past_key_values=cache, max_new_tokens=1, do_sample=False)
        return lambda: model.generate(pick(text), **options)

    return prepare


def _changed(change):
    def prepare(model, text):
        later = _used(model, text)
        change(model)
        return later

    return prepare


def _with_gradients(model, text):
    later = _used(model, text)

    def call():
        with torch.enable_grad():
            later()

    return call


def _in_training(model, text):
    later = _used(model, text)
    model.config.layerdrop = 0.1
    model.train()
    return later


def _with_cache(action):
    def prepare(model, text):
        cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
        model(text, past_key_values=cache)
        return lambda: action(cache)

    return prepare


def _attaching(thing):
    return lambda model, _text: lambda: KVMerger.from_profile(uniform_values(model, share=0.5)).attach(thing)


def _two_rows(model, text):
    cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
    model(text, past_key_values=cache)
    return lambda: model(text.repeat(2, 1), past_key_values=cache)


# Each prepares, and returns the call that has to be refused.
IN_PYTHON = {
    "padding on the right": _padded,
    "detached": _detached,
    "another text": _generating(lambda text: text.flip(1)),
    "the same text": _generating(lambda text: text[:, :80]),
    "another batch": _two_rows,
    "assisted": _generating(lambda text: text, prompt_lookup_num_tokens=3),
    "use_cache": lambda model, text: _used(model, text, use_cache=False),
    "output_attentions": lambda model, text: _used(model, text, output_attentions=True),
    "crop": _with_cache(lambda cache: cache.crop(-60)),
    "pickle": _with_cache(pickle.dumps),
    "offload": _with_cache(lambda cache: cache.layers[0].offload()),
    "gradients": _with_gradients,
    "training": _in_training,
    "cast": _changed(lambda model: model.bfloat16()),
    "switched": _changed(lambda model: model.set_attn_implementation("eager")),
    "compiled": _changed(lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager"))),
    "a name": _attaching("smollm2-135m"),
    "Mamba": _attaching(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))),
    "attached in training": _attaching(tiny_model().train()),
}


@torch.no_grad()
def test_what_python_says_is_on_the_page():
    shown = {
        line for block in re.findall(r"```text\n(.+?)\n```", PAGE.read_text(), re.DOTALL) for line in block.split("\n")
    }
    for name, prepare in IN_PYTHON.items():
        refused = prepare(tiny_model(), tiny_text(90))
        with pytest.raises(KVProfileError) as caught:
            refused()
        found = {text for text in shown if str(caught.value).startswith(text)}
        assert len(found) == 1, f"{name}: {caught.value}"
        shown -= found
    assert not shown


def test_the_page_has_the_likeliest_mistakes():
    assert len(SHOWN) >= 10
    assert len(SHOWN) == PAGE.read_text().count("```console")
    assert {entry["code"] for entry in SHOWN} == {"1", "2", "3"}
