"""`kvprofile doctor --device`: it passes where all works, and tells in one line what does not."""

import json

import pytest
import torch

from kvprofile.doctor import environment as doctor_module
from kvprofile.doctor import selftest
from kvprofile.doctor.selftest import attention
from kvprofile.runtime.backends.compiled.backend import missing
from kvprofile.runtime.backends.contract import Facts
from kvprofile.runtime.backends.varlen import unsuited
from tests.unit.conftest import run

DECODING = "products over blocks" if missing() else "compiled code"


@pytest.fixture
def one_dtype(monkeypatch):
    monkeypatch.setattr(selftest, "_dtypes", lambda _device: [torch.float32])


@pytest.mark.parametrize("dtype", list(attention.TOLERANCE))
@pytest.mark.parametrize("shape", attention.SHAPES, ids=lambda shape: shape.name)
def test_every_kind_of_layer_agrees_with_float64_in_every_dtype(shape, dtype):
    told, passed = attention.check_attention(torch.device("cpu"), dtype, shape)
    assert passed, told
    way = "products head by head" if shape.name == "many queries" else DECODING
    assert told.startswith(f"{way} (the kernel is CUDA's")


def test_the_float64_loop_finds_a_wrong_back_end(monkeypatch):
    right = attention.ragged_attention

    def wrong(call, blocks, **options):
        output, mass = right(call, blocks, **options)
        return output * 1.02, mass

    monkeypatch.setattr(attention, "ragged_attention", wrong)
    _, passed = attention.check_attention(torch.device("cpu"), torch.float32, attention.SHAPES[0])
    assert not passed


@pytest.mark.usefixtures("one_dtype")
def test_a_device_that_works_passes_and_every_layer_is_told():
    result = run("doctor", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["device"], found["problems"]) == ("cpu", [])
    assert {step["passed"] for step in found["steps"]} == {True}
    assert found["serves"]["layer 0 of a tiny Gemma 2, float32"] == "the stock cache and attention (a sliding window)"
    assert found["serves"]["layer 1 of a tiny Gemma 2, float32"].startswith(DECODING)
    assert set(found["facts"]) >= {"torch", "memory", "threads"}


@pytest.mark.usefixtures("one_dtype")
def test_what_fails_is_one_line_and_exit_code_1(monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("expected all tensors on one device\nand more lines")

    monkeypatch.setattr(selftest, "check_model", broken)
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 1
    problems = [line for line in result.stdout.splitlines() if line.startswith("Problem: ")]
    told = "in float32 on cpu: RuntimeError: expected all tensors on one device"
    assert problems == [f"Problem: calibrate and generate, a tiny {name} {told}" for name in ("Llama", "Gemma 2")]


@pytest.mark.parametrize(
    ("device", "told"),
    [("gpu", "unknown device 'gpu'"), ("cuda", "0 CUDA devices were found"), ("mps", "this machine has none")],
)
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = run("doctor", "--device", device)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "the kernel is CUDA's"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"softcap": 30.0}, "no soft cap"),
        ({"dim": 252}, "steps of 8 up to 248"),
        ({"dim": 256}, "steps of 8 up to 248"),
        ({"capability": (7, 5)}, "needs capability 8.0, this is 7.5"),
    ],
)
def test_the_reason_for_a_back_end_is_told(monkeypatch, changes, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: changes.get("capability", (9, 0)))
    known = {"device": torch.device("cuda"), "dtype": torch.float16, "dim": 128, "softcap": None, **changes}
    device, dim = torch.device(known["device"]), known["dim"]
    told = unsuited(Facts(device, known["dtype"], dim, dim, 1, known["softcap"] is not None))
    assert told is None if reason is None else reason in told


@pytest.mark.parametrize(
    ("token", "told"), [("hf_secret", "there"), (None, "none; gated models such as llama2-7b need")]
)
def test_the_doctor_tells_whether_a_token_is_there_and_never_which(monkeypatch, tmp_path, token, told):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr(doctor_module, "_hub", lambda _timeout: "no (tests do not ask)")
    monkeypatch.setattr(doctor_module, "_text_problems", list)
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path))
    result = run("doctor")
    assert told in result.stdout
    assert "secret" not in result.output
    assert "kvprofile doctor --device auto" in result.stdout
