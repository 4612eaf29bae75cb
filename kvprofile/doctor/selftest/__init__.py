"""Does kvprofile work on this device? Back ends against float64, then a calibration and generations of tiny random models."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from kvprofile.doctor.selftest.attention import SHAPES, check_attention
from kvprofile.doctor.selftest.models import check_model, configurations
from kvprofile.models.device_and_dtype import choose_placement


@dataclass(frozen=True)
class Step:
    """One thing that was tried: what, in which dtype, how it went in a clause, and whether it went well."""

    what: str
    dtype: str
    told: str
    passed: bool


@dataclass
class SelfTest:
    """A device, facts about it in words, which back end serves which layer, and what was tried on it."""

    device: str
    facts: dict[str, str]
    serves: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What failed, a line each."""
        return [f"{step.what} in {step.dtype} on {self.device}: {step.told}" for step in self.steps if not step.passed]


def self_test(device: str) -> SelfTest:
    """Try a device out: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Takes about twenty seconds on a CPU; nothing is fetched.

    Raises UsageError for a device that is unknown or not there.
    """
    started = time.perf_counter()
    target, _, _ = choose_placement(device, "auto", None)
    assert target is not None  # no device map was given
    found = SelfTest(str(target), _facts(target))
    for dtype in _dtypes(target):
        for shape in SHAPES:
            _try(found, f"attention, {shape.name}", dtype, partial(check_attention, target, dtype, shape))
        for name in configurations():
            _try(found, f"calibrate and generate, {name}", dtype, partial(_model, found, name, target, dtype))
    if target.type == "cuda":
        found.facts["memory used"] = f"{torch.cuda.max_memory_allocated(target) / 2**20:.0f} MiB at most"
    found.seconds = time.perf_counter() - started
    return found


def _model(found: SelfTest, name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, bool]:
    told, passed, serves = check_model(name, device, dtype)
    found.serves |= {f"{layer}, {_short(dtype)}": text for layer, text in serves.items()}
    return told, passed


def _try(found: SelfTest, what: str, dtype: torch.dtype, action: Callable[[], tuple[str, bool]]) -> None:
    """Note how an action went; an error of whatever kind is a finding, not an end."""
    try:
        told, passed = action()
    except Exception as error:
        told, passed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", False
    found.steps.append(Step(what, _short(dtype), told, passed))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(device: torch.device) -> Iterator[torch.dtype]:
    """What models are run in there."""
    yield torch.float32
    yield torch.float16
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
        yield torch.bfloat16


def _facts(device: torch.device) -> dict[str, str]:
    facts = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts["name"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory"] = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
        facts["CUDA"] = str(torch.version.cuda)
    else:
        from kvprofile.doctor.environment import host_memory

        facts["name"] = platform.processor() or platform.machine()
        facts["threads"] = str(torch.get_num_threads())
        facts["memory"] = f"{host_memory() / 2**30:.1f} GiB" if host_memory() else "unknown"
    return facts
