"""docs/troubleshooting.md shows commands and what they say: every one is run here, and has to say just that."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from kvprofile import KVMerger, load_arrays, load_model, load_profile, save_profile
from kvprofile.calibration.partials import partial_path
from kvprofile.errors import KVProfileError
from tests.unit.conftest import run, save_tiny_model
from tests.unit.test_models import http_error

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
BLOCK = re.compile(r"```console\n\$ (?P<command>.+)\n(?P<error>.+)\n```\n\nExit code (?P<code>\d)\. ")
SHOWN = [match.groupdict() for match in BLOCK.finditer(PAGE.read_text())]


def _gated(*_args, **_kwargs):
    raise http_error(errors.GatedRepoError, 403)


def _without_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


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
    values = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "newer.json").write_text(json.dumps({**values, "schema_version": 3}))
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
    elif "long.txt" in words:
        monkeypatch.setattr("kvprofile.calibration.calibrate.read_probe", _without_memory)
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


def test_what_python_says_is_on_the_page(tiny_folder, tiny_profile):
    page = set(re.findall(r"```text\n(.+)\n```", PAGE.read_text()))
    model = load_model(str(tiny_folder), device="cpu").model
    merger = KVMerger.from_profile(tiny_profile).attach(model)
    tokens = torch.arange(1, 81)[None]
    mask = torch.ones_like(tokens)
    mask[:, -8:] = 0
    with pytest.raises(KVProfileError) as padded:
        model(tokens, attention_mask=mask, past_key_values=merger.cache())
    late = merger.cache()
    merger.detach()
    with pytest.raises(KVProfileError) as detached:
        model(tokens, past_key_values=late)
    for caught in (padded, detached):
        (shown,) = {text for text in page if str(caught.value).startswith(text)}
        page.remove(shown)
    assert not page


def test_the_page_has_the_likeliest_mistakes():
    assert len(SHOWN) >= 10
    assert len(SHOWN) == PAGE.read_text().count("```console")
    assert {entry["code"] for entry in SHOWN} == {"1", "2", "3"}
