"""Which device and which dtype a model gets, and why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kvprofile.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DTYPES = ("float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device: str, dtype: str, device_map: str | dict[str, Any] | None) -> None:
    """Raise UsageError for values that no machine understands, or that contradict each other; torch is not loaded."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if device_map is not None and device != "auto":
        raise UsageError(f"device {device!r} and a device map were both given; give one of them")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UsageError(
            f"unknown device map {device_map!r}: expected {', '.join(DEVICE_MAPS)}; for one device use device"
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}: expected auto, cpu, mps, cuda or cuda:N")


def choose_placement(
    device: str, dtype: str, device_map: str | dict[str, Any] | None, stored: torch.dtype | None = None
) -> tuple[torch.device | None, torch.dtype, str]:
    """The device (None where accelerate places the model), the dtype, and one line that says why.

    `stored` is the dtype of the checkpoint, where known.

    Raises:
        UsageError: a value is unknown, contradicts another, or names a device this machine does not have.
    """
    check_placement(device, dtype, device_map)
    import torch

    cuda, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= cuda:
        raise UsageError(f"device {device!r} asked for, but {cuda} CUDA devices were found; use auto or cpu")
    if device == "mps" and not mps:
        raise UsageError("device 'mps' asked for, but this machine has none; use auto or cpu")

    if device == "auto":
        kind = "cuda" if cuda else "mps" if mps else "cpu"
        reason = {"cuda": "CUDA found", "mps": "no CUDA device, but MPS found", "cpu": "no CUDA device found"}[kind]
    else:
        kind, reason = device, "as asked"
    where = f"device {kind} ({reason})" if device_map is None else "devices placed by accelerate (as asked)"
    chosen, why = (dtype, "as asked") if dtype != "auto" else _default_dtype(kind, stored)
    target = torch.device(kind) if device_map is None else None
    return target, getattr(torch, chosen), f"{where}, dtype {chosen} ({why})"


def _default_dtype(device: str, stored: torch.dtype | None) -> tuple[str, str]:
    import torch

    half = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(stored) if stored is not None else None
    if device == "cpu":
        return "float32", f"fastest and exact on a CPU{f'; the checkpoint has {half}' if half else ''}"
    native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    if half == "float16" or (half == "bfloat16" and native):
        return half, "as the checkpoint has it"
    if native:
        return "bfloat16", "half the memory, and the device computes in it"
    return "float16", "half the memory; no native bfloat16 here"


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype of the checkpoint, as its configuration says; None where it does not."""
    import torch

    found = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return getattr(torch, found, None) if isinstance(found, str) else found
