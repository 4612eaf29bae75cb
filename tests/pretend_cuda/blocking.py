"""Which operations launch a kernel on CUDA, and which make the host wait for the device."""

from typing import Any

import torch

aten = torch.ops.aten

# Copies between devices; what they cost depends on where from and where to.
MOVES = {aten.copy_.default}
# An index may lie on the CPU: it is copied over, and the host waits.
TAKES_HOST_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Their result's size, or a Python number, depends on numbers on the device.
_DATA_DEPENDENT = {
    "_local_scalar_dense": "item",
    "_linalg_check_errors": "check of a factorisation",
    "_unique2": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
}
# Views are found by torch's own mark; these allocate, or do nothing.
_NO_KERNEL = {
    "_local_scalar_dense",
    "_reshape_alias",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}


def launches(function: Any) -> bool:
    """True if the operation runs at least one kernel; one that runs several counts once."""
    return not function.is_view and function.overloadpacket.__name__ not in _NO_KERNEL


def waits(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pretended: type) -> str | None:
    """Why the host waits for the device in this operation; None if it does not."""
    name = function.overloadpacket.__name__
    if function is aten.repeat_interleave.Tensor:
        return None if kwargs.get("output_size") is not None else "repeat_interleave"
    if function in TAKES_HOST_INDEX:
        return _index_waits(function, args, pretended)
    if function is aten.copy_.default:
        return _copy_waits(args, kwargs, pretended)
    return _DATA_DEPENDENT.get(name)


def _index_waits(function: Any, args: tuple[Any, ...], pretended: type) -> str | None:
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if masks:
        # A number written through a single mask is a masked_fill.
        number = function is not aten.index.Tensor and args[2].dim() == 0 and not isinstance(args[2], pretended)
        return None if number and len(indices) == 1 else "boolean index"
    return "index on the host" if any(not isinstance(index, pretended) for index in indices) else None


def _copy_waits(args: tuple[Any, ...], kwargs: dict[str, Any], pretended: type) -> str | None:
    to, source = args[:2]
    if not source.numel() or (isinstance(to, pretended) and not source.dim()):
        return None  # a Python number goes along with the kernel that writes it
    non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
    return copy_waits(isinstance(source, pretended), isinstance(to, pretended), non_blocking)


def copy_waits(from_cuda: bool, to_cuda: bool, non_blocking: bool) -> str | None:
    """Why the host waits for a copy; None between two CUDA devices.

    A copy of pageable memory to the device that need not be waited for is staged and returns at once (CUDA's "API
    synchronization behavior"); back from the device the host has to wait in any case before it can read.
    """
    if from_cuda == to_cuda or (to_cuda and non_blocking):
        return None
    return "copy to the device" if to_cuda else "copy to the host"
