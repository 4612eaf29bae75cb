"""The configurations that come with the package: every alias has one, it is the published model, and the hub's goes first."""

import json
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import errors
from transformers import AutoConfig, AutoModelForCausalLM

from kvprofile.cli import main
from kvprofile.errors import KVProfileError
from kvprofile.models import load as models
from kvprofile.models.configurations import bundled_configuration
from kvprofile.models.device_and_dtype import stored_dtype
from kvprofile.models.load import load_config
from kvprofile.models.names import known_models, resolve
from kvprofile.profile.fingerprint import model_facts
from tests.unit.test_models import COMMIT, http_error, raising

# Parameters in billions as the model cards and reports give them, to three digits.
PUBLISHED = {
    "smollm2-135m": 0.135,
    "gemma3-270m": 0.268,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
    "llama2-7b": 6.74,
    "llama2-7b-chat": 6.74,
    "llama2-13b": 13.0,
    "llama2-13b-chat": 13.0,
    "llama3.1-8b": 8.03,
    "llama3.1-8b-instruct": 8.03,
    "llama3.2-1b": 1.24,
    "llama3.2-1b-instruct": 1.24,
    "llama3.2-3b": 3.21,
    "llama3.2-3b-instruct": 3.21,
    "mistral-7b": 7.25,
    "mistral-7b-instruct": 7.25,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.62,
    "qwen2.5-7b-instruct": 7.62,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.19,
    "gemma2-2b": 2.61,
    "gemma3-1b": 1.00,
    "phi3-mini": 3.82,
}


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that cannot be reached, and empty caches."""
    failure = errors.RevisionResolutionError("unreachable")
    monkeypatch.setattr(huggingface_hub, "resolve_revision", raising(failure))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path / "cache"))


def test_every_alias_has_a_configuration_and_a_published_count():
    names = {alias.name for alias in known_models()}
    assert names == set(PUBLISHED)
    assert all(bundled_configuration(name) is not None for name in names)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_offline_every_alias_is_the_published_model_and_one_line_says_where_it_is_from(name):
    told = []
    config = load_config(name, log=told.append)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert float(f"{count:.3g}") == PUBLISHED[name]
    assert stored_dtype(config) in (torch.float16, torch.bfloat16, torch.float32)
    assert len(told) == 1
    assert told[0].startswith(f"Using the configuration of {name} that comes with kvprofile: ")
    assert "\n" not in told[0]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_bundled_configuration_is_the_model_that_profiles_were_made_for(name):
    made = json.loads(Path("profiles", f"{name}.json").read_text())["model"]
    facts = model_facts(AutoConfig.for_model(**bundled_configuration(name)))
    assert facts.keys() - made.keys() <= {"window"}  # profiles made before windows were planned do not say it
    assert {fact: made[fact] for fact in facts if fact in made} == {fact: facts[fact] for fact in facts if fact in made}


def test_where_the_hub_answers_its_configuration_is_taken(monkeypatch):
    other = AutoConfig.for_model(**{**bundled_configuration("llama2-7b"), "num_hidden_layers": 3})
    told = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "resolve_revision", lambda _repo, revision: huggingface_hub.ResolvedRevision(COMMIT, revision)
    )
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_args, **_options: other)
    assert load_config("llama2-7b", log=told.append).num_hidden_layers == 3
    assert told == []


@pytest.mark.usefixtures("no_hub")
def test_a_revision_or_another_repository_has_no_bundled_configuration():
    for name, revision in (("llama2-7b", "v9"), ("org/name", None)):
        with pytest.raises(KVProfileError, match="cannot be reached"):
            load_config(name, revision)


def test_a_gated_repository_is_planned_for_and_its_licence_page_told(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "resolve_revision", lambda _repo, revision: huggingface_hub.ResolvedRevision(COMMIT, revision)
    )
    gated = http_error(errors.GatedRepoError, 403)
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", raising(gated))
    told = []
    assert load_config("llama2-7b", log=told.append).num_hidden_layers == 32
    assert "accept its licence at https://huggingface.co/meta-llama/Llama-2-7b-hf" in told[0]
    assert "`hf auth login`" in told[0]
    with pytest.raises(KVProfileError, match=r"huggingface\.co/meta-llama/Llama-2-7b-hf and log in with `hf auth"):
        models.load_model("llama2-7b", device="cpu")


@pytest.mark.parametrize("cached", [False, True])
def test_a_hub_that_stays_silent_is_given_up_and_the_cache_asked(monkeypatch, cached):
    silence = threading.Event()

    def resolve_revision(_repo, *, revision, local_files_only=False):
        if not local_files_only:
            silence.wait()
        if cached:
            return huggingface_hub.ResolvedRevision(COMMIT, revision)
        raise errors.RevisionResolutionError("not cached")

    monkeypatch.setattr(huggingface_hub, "resolve_revision", resolve_revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "HUB_SECONDS", 0.01)
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT", raising=False)
    try:
        if cached:
            assert models._locate(resolve("org/name"), print)[2] == COMMIT
        else:
            with pytest.raises(KVProfileError, match=r"cannot be reached for org/name \(no answer in 0.01 s\)"):
                load_config("org/name")
    finally:
        silence.set()


@pytest.mark.usefixtures("no_hub")
def test_a_dry_run_needs_no_hub():
    result = CliRunner().invoke(main, ["calibrate", "llama2-7b", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "6,738M parameters" in result.stdout
    assert result.stderr.count("\n") == 1
