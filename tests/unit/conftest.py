"""A tiny model in a folder, and a profile calibrated on it through the command line."""

import string
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvprofile.cli import main
from kvprofile.runtime.backends.table import BACKENDS
from tests.pretend_cuda import PretendCuda
from tests.unit.tiny_models import tiny_model


def run(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save_tiny_model(folder: Path, **changes: object) -> Path:
    """Save a random two-layer Llama with a tokenizer of single characters."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token."""
    vocabulary = {character: index for index, character in enumerate(string.printable)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?unknown": len(vocabulary)}, unk_token="?unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?unknown")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(f"Sentence {number} tells of {number * 7919 % 1000} birds." for number in range(400)))
    return path


@pytest.fixture(scope="session")
def tiny_profile(tiny_folder, tiny_text_file, tmp_path_factory) -> Path:
    """A real profile of the tiny model, its arrays beside it."""
    path = tmp_path_factory.mktemp("profile") / "tiny.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 3, "--held-out", 2)
    result = run("calibrate", tiny_folder, "-o", path, *size)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def gpu():
    """Two pretended CUDA devices, and what happened on them."""
    with PretendCuda() as pretended:
        yield pretended


@pytest.fixture
def torch_alone(monkeypatch):
    """Compiled code does not serve the processor, so that its numbers are to the bit those of pretended devices."""
    monkeypatch.setitem(BACKENDS, "compiled", replace(BACKENDS["compiled"], unable=lambda _facts: "not in this test"))
