"""What a run took of a device's memory, and what to do where it was too much."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvprofile.errors import KVProfileError, is_memory
from kvprofile.models.offloading import input_device

if TYPE_CHECKING:
    import torch


@contextmanager
def explaining_memory(model: "torch.nn.Module", doing: str, shorten: str, kept: str = "") -> Iterator[None]:
    """Turn running out of memory while `doing` something with a model into one line on what to do.

    `shorten` says how to read less at a time, `kept` what is not lost. Raises KVProfileError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        told = str(error).strip().partition("\n")[0].partition(" Of the allocated memory")[0]
        ways = [shorten, "spread the model with --device-map auto"]
        if any(parameter.element_size() == 4 and parameter.is_floating_point() for parameter in model.parameters()):
            ways.insert(1, "take --dtype bfloat16 or float16")
        raise KVProfileError(
            f"out of memory while {doing} ({told.rstrip('.') or type(error).__name__}); {', or '.join(ways)}{kept}"
        ) from error


def device_peaks(model: "torch.nn.Module") -> dict[str, int]:
    """The most bytes that tensors took on each CUDA device that a part of the model runs on; empty where none does."""
    import torch

    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())} | {input_device(model)}
    names = sorted(str(device) for device in devices if device.type == "cuda")
    return {name: torch.cuda.max_memory_allocated(name) for name in names}
