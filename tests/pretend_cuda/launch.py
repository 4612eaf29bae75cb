"""A stand-in for launching Triton's kernels: what a launch needs is checked, and the kernel runs in Triton's interpreter."""

from typing import Any

from torch import Tensor

from kvprofile.runtime.backends import triton_decode
from tests.pretend_cuda.tensor import PretendTensor, inner_of

_launch = triton_decode.launch


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """See `triton_decode.launch`. Raises ValueError where a tensor does not lie on the one device."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    places = {tensor.place if isinstance(tensor, PretendTensor) else tensor.device for tensor in tensors}
    if len(places) != 1 or not all(isinstance(tensor, PretendTensor) for tensor in tensors):
        raise ValueError(f"{name}: all tensors must be on one CUDA device, got {sorted(map(str, places))}")
    if PretendTensor.watcher is not None:
        PretendTensor.watcher.launched(name)
    _launch(name, grid, *map(inner_of, arguments), **constants)
