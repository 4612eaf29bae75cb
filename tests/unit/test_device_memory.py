"""Out of memory, simulated where it happens: one line says what to lower, and what was finished is kept."""

import builtins
import errno
import os

import click
import pytest
import torch
from click.testing import CliRunner

from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.partials import partial_path, sample_files
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.cli.group import Group
from kvprofile.errors import KVProfileError
from kvprofile.models.device_memory import explaining_memory
from kvprofile.models.failures import explain
from kvprofile.models.load import LoadedModel
from kvprofile.models.names import Source
from tests.pretend_cuda import on_cuda
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.test_half_precision import loaded
from tests.unit.tiny_models import tiny_model

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free. Of "
    "the allocated memory 70 GiB is allocated by PyTorch.\nSee the documentation"
)
CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ERRORS = {
    "CUDA": torch.OutOfMemoryError(CUDA),
    "CPU": RuntimeError(CPU),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Python": MemoryError(),
}
SIZE = ("--tokens", 256, "--samples", 3, "--held-out", 1, "--dtype", "float32", "--device", "cpu")


def failing(function, error, after):
    """The function until it has been called so often; then it has no memory."""
    calls = []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise error
        return function(*args, **kwargs)

    return call


# Of memory that runs out while libraries are imported or files are mapped, as glibc, torch and safetensors word it.
ELSEWHERE = {
    "import": ImportError("_dierckx.cpython-311-x86_64-linux-gnu.so: failed to map segment from shared object"),
    "thread-local storage": ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    "system call": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "mapping": RuntimeError(
        "unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)"
    ),
    "safetensors": ValueError('Os { code: 12, kind: OutOfMemory, message: "Cannot allocate memory" }'),
    "C++": RuntimeError("std::bad_alloc"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_every_way_of_running_out_is_told_in_one_line(error):
    model = tiny_model()
    with pytest.raises(KVProfileError) as caught, explaining_memory(model, "reading", "read less", "; nothing is lost"):
        raise error
    told = str(caught.value)
    assert told.startswith("out of memory while reading (")
    assert told.endswith(
        "); read less, or take --dtype bfloat16 or float16, or spread the model with --device-map auto; nothing is lost"
    )
    assert "GPU 0 has" in told or "GPU" not in str(error)
    assert "PyTorch" not in told


def test_a_model_in_half_precision_is_not_told_to_take_it():
    with (
        pytest.raises(KVProfileError) as caught,
        explaining_memory(tiny_model().to(torch.float16), "reading", "read less"),
    ):
        raise MemoryError
    told = "out of memory while reading (MemoryError); read less, or spread the model with --device-map auto"
    assert str(caught.value) == told


def test_another_error_stays_itself():
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        explaining_memory(tiny_model(), "reading", "read less"),
    ):
        raise RuntimeError("shapes differ")


def ended(error, monkeypatch):
    """How a command ends in which no more can be imported, and then there is this error."""

    @click.group(cls=Group)
    def main():
        pass

    @main.command()
    def work():
        def nothing(*_arguments):
            raise MemoryError

        patched.setattr(builtins, "__import__", nothing)
        raise error

    with monkeypatch.context() as patched:
        return CliRunner().invoke(main, ["work"])


@pytest.mark.parametrize("error", [*ERRORS.values(), *ELSEWHERE.values()], ids=[*ERRORS, *ELSEWHERE])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
def test_a_command_that_has_no_memory_left_says_so(error, wrapped, monkeypatch):
    if wrapped:  # as transformers wraps what its lazy imports meet
        outer = RuntimeError("Failed to import transformers.models.llama because of the following error (look up)")
        outer.__cause__ = error
        error = outer
    result = ended(error, monkeypatch)
    assert result.exit_code == 1
    assert result.output == "Error: out of memory; close other programs, or take a smaller model or --dtype\n"


def test_a_command_that_fails_otherwise_shows_its_error(monkeypatch):
    wrong = ImportError("cannot import name 'stop'")
    assert ended(wrong, monkeypatch).exception is wrong


@pytest.mark.parametrize("error", [*ERRORS.values(), *ELSEWHERE.values()], ids=[*ERRORS, *ELSEWHERE])
def test_a_model_that_cannot_be_loaded_for_want_of_memory_is_not_called_damaged(error):
    told = explain(error, Source("tiny", "folder", "tiny"))
    assert told == "folder:tiny does not fit into the device's memory: use a device map, a smaller dtype or the CPU"


def test_finished_samples_are_kept_and_resumed(tiny_folder, tiny_text_file, tmp_path, monkeypatch):
    output = tmp_path / "p.json"
    command = ("calibrate", tiny_folder, "--data", tiny_text_file, "-o", output, *SIZE)
    with monkeypatch.context() as patched:
        patched.setattr("kvprofile.calibration.measuring.read_probe", failing(read_probe, ERRORS["CUDA"], 2))
        told = ("measuring a sample of 256 tokens", "lower --tokens", "--dtype", "--device-map auto", "--resume")
        refused(run(*command), 1, *told)
    assert len(sample_files(partial_path(output))) == 2
    assert os.listdir(tmp_path) == ["p.partial"]

    with monkeypatch.context() as patched:
        reads = []
        patched.setattr(Measurements, "update", counting(Measurements.update, reads))
        assert run(*command, "--resume").exit_code == 0
    assert len(reads) == 2  # the two layers of one sample


def counting(function, calls):
    def call(*args, **kwargs):
        calls.append(None)
        return function(*args, **kwargs)

    return call


def test_checking_evaluating_and_generating_tell_it_as_well(
    tiny_folder, tiny_profile, tiny_text_file, tmp_path, monkeypatch
):
    output = tmp_path / "p.json"
    monkeypatch.setattr("kvprofile.evaluate.check.read_through", failing(None, ERRORS["CPU"], 0))
    result = run("calibrate", tiny_folder, "--data", tiny_text_file, "-o", output, *SIZE)
    refused(result, 1, "out of memory while checking the plan on 256 tokens", "can't allocate memory", "lower --tokens")
    assert len(sample_files(partial_path(output))) == 3

    monkeypatch.setattr("kvprofile.evaluate.bench.read_parts", failing(None, ERRORS["CPU"], 0))
    few = ("--data", tiny_text_file, "--documents", 1, "--examples", 0, "--tokens", 256, "-o", tmp_path / "rows.json")
    result = run("evaluate", tiny_folder, "--profile", tiny_profile, *few)
    refused(result, 1, "out of memory while reading 256 tokens with full", "lower --tokens")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", failing(None, ERRORS["CPU"], 0))
    result = run("generate", tiny_folder, "--profile", tiny_profile, "--prompt", "Once")
    refused(result, 1, "out of memory while generating after a prompt of 4 tokens", "fewer --max-new-tokens")


def test_the_peak_is_that_of_the_devices_the_model_lies_on(gpu, monkeypatch):
    from kvprofile.cli.common import peak_memory

    peaks = {"cuda:0": 3 * 2**30, "cuda:1": 2**29}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    own = loaded("Llama", torch.float32)
    assert "cuda" not in peak_memory(own)
    there = LoadedModel(on_cuda(own.model), own.tokenizer, own.name, own.source, None)
    assert peak_memory(there) == "3.0 GiB on cuda:0"
