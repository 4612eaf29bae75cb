"""The mode in which `cuda` means a pretended device."""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvprofile.runtime.backends import triton_decode
from tests.pretend_cuda.blocking import copy_waits
from tests.pretend_cuda.kernel import varlen_attn
from tests.pretend_cuda.launch import launch
from tests.pretend_cuda.tensor import CPU, PretendTensor, device_of, inner_of

DEVICES = 2
CAPABILITY = (9, 0)
MULTIPROCESSORS = 4
# Built on the CPU from Python's numbers and then copied: torch waits for the copy.
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type_as)
_ONE_KERNEL = (torch.nn.functional.scaled_dot_product_attention,)


def cuda_device(device: Any) -> torch.device | None:
    """The pretended device that `device` means; None for the CPU and for nothing."""
    if device is None:
        return None
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else None


class _Moved(torch.autograd.Function):
    """A copy on another device; the gradient goes back to the first."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, place: torch.device | None) -> Tensor:
        ctx.place = source.place if isinstance(source, PretendTensor) else None
        copy = inner_of(source).detach().clone()
        return copy if place is None else PretendTensor(copy, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Moved.apply(gradient, ctx.place), None


class _Beside(TorchDispatchMode):
    """What torch's C++ makes for itself while it works on tensors of a device lies there too."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        inputs = any(isinstance(part, Tensor) for part in tree_leaves((args, kwargs)))
        return made if inputs or not isinstance(made, Tensor) else PretendTensor(made, self.place)


class PretendCuda(TorchFunctionMode):
    """Inside, `.to("cuda")` and `device="cuda:1"` make pretended tensors, and what they do is counted.

    syncs, launches: how often, by `"file:line what"`; the innermost line of kvprofile, or else of transformers or the test.
    triton: whether it is to be had; its kernels then run in its interpreter, which takes a while.
    """

    def __init__(self, triton: bool = False) -> None:
        super().__init__()
        self.triton = triton
        self.syncs: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._fused = 0

    def forget(self) -> None:
        """Count from nothing again."""
        self.syncs.clear()
        self.launches.clear()

    def launched(self, what: str) -> None:
        """A kernel or a copy was launched."""
        if not self._fused:
            self.launches[f"{_place()} {what}"] += 1

    def waited(self, what: str) -> None:
        """The host waited for the device."""
        self.syncs[f"{_place()} {what}"] += 1

    def __enter__(self) -> "PretendCuda":
        self._patches = ExitStack()
        self._patches.enter_context(mock.patch.object(PretendTensor, "watcher", self))
        self._patches.enter_context(mock.patch.object(torch, "Generator", _generator))
        self._patches.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_attn))
        self._patches.enter_context(
            mock.patch.multiple(
                triton_decode,
                installed=lambda: self.triton,
                trouble=lambda _device: None,
                launch=launch,
                _multiprocessors=lambda _device: MULTIPROCESSORS,
            )
        )
        pretended = {
            "is_available": lambda: True,
            "device_count": lambda: DEVICES,
            "current_device": lambda: 0,
            "get_device_capability": lambda *_: CAPABILITY,
            "get_device_name": lambda *_: "Pretended",
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": lambda *_: self.waited("synchronize"),
        }
        # A module that is moved gets new parameters: the pretended ones cannot be written into those it has.
        replaced = mock.patch("torch.__future__.get_overwrite_module_params_on_conversion", return_value=True)
        self._patches.enter_context(replaced)
        for name, function in pretended.items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.device and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        if function in _MOVES:
            return self._move(function, args, kwargs)
        if function in _ONE_KERNEL and isinstance(args[0], PretendTensor):
            return self._as_one(function, args, kwargs)
        if "device" in kwargs or function is Tensor.new_tensor:
            return self._made(function, args, kwargs)
        place = next((part.place for part in tree_leaves((args, kwargs)) if isinstance(part, PretendTensor)), None)
        if place is None:
            return function(*args, **kwargs)
        with _Beside(place):
            return function(*args, **kwargs)

    def _made(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a factory gives, on the device it was asked for."""
        asked = kwargs.get("device")
        like = args[0] if args and isinstance(args[0], Tensor) else None
        place = cuda_device(device_of(like) if asked is None and like is not None else asked)
        if place is None:
            return inner_of(function(*args, **kwargs))  # asked for on the CPU, like what lies elsewhere
        kwargs.pop("device", None)
        made = function(*args, **kwargs)
        if not isinstance(made, Tensor):
            return made
        if isinstance(made, PretendTensor):
            return made if made.place == place else PretendTensor(made.inner, place)
        if made.numel():
            if function in _FROM_NUMBERS:
                self.waited("copy to the device")
            self.launched(function.__name__)
        needs_gradient = made.requires_grad
        return PretendTensor(made.detach(), place).requires_grad_(needs_gradient)

    def _move(self, function: Any, args: Any, kwargs: Any) -> Any:
        source, rest = args[0], args[1:]
        place, non_blocking = _target(function, source, rest, kwargs)
        now = device_of(source)
        if function is Tensor.type_as:
            changed = source.to(rest[0].dtype)
        elif function is Tensor.to:
            options = [part for part in rest if isinstance(part, torch.dtype)]
            options += [part.dtype for part in (*rest, kwargs.pop("other", None)) if isinstance(part, Tensor)]
            kept = {name: kwargs[name] for name in ("dtype", "copy", "memory_format") if name in kwargs}
            changed = Tensor.to(source, *options, **kept) if options or kept else source
        else:
            changed = source
        if place == now:
            return changed
        if changed.numel():
            self.launched("copy between devices")
            reason = copy_waits(now.type == "cuda", place.type == "cuda", non_blocking)
            if reason is not None:
                self.waited(reason)
        return _Moved.apply(changed, cuda_device(place))

    def _as_one(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.launched(function.__name__)
        self._fused += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._fused -= 1


def _target(function: Any, source: Tensor, rest: Any, kwargs: Any) -> tuple[torch.device, bool]:
    """Where a move goes, and whether the host need not wait for it."""
    non_blocking = bool(kwargs.get("non_blocking", False))
    if function is Tensor.cpu:
        return CPU, False
    if function is Tensor.cuda:
        device = kwargs.get("device", rest[0] if rest else 0)
        return cuda_device(0 if device is None else device) or CPU, non_blocking
    others = [part for part in (*rest, kwargs.get("other")) if isinstance(part, Tensor)]
    if others:
        return device_of(others[0]), non_blocking
    asked = [part for part in rest if isinstance(part, (str, torch.device))]
    asked += [part for part in rest[:1] if isinstance(part, int) and not isinstance(part, bool)]
    device = kwargs.get("device", asked[0] if asked else None)
    if device is None:
        return device_of(source), non_blocking
    return cuda_device(device) or torch.device(device), non_blocking or (len(rest) > 2 and rest[2] is True)


_REAL_GENERATOR = torch.Generator


def _generator(device: Any = None) -> torch.Generator:
    """A generator of any device, pretended ones too."""
    return _REAL_GENERATOR(CPU if cuda_device(device) else device or CPU)


def _place() -> str:
    """The innermost line of the package; else of transformers, else of the caller."""
    found = {}
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for part in ("/kvprofile/", "/transformers/", "/tests/"):
            if part in name and "/pretend_cuda/" not in name and part not in found:
                found[part] = f"{name.rpartition(part)[2]}:{frame.f_lineno}"
        if "/kvprofile/" in found:
            return found["/kvprofile/"]
        frame = frame.f_back
    return found.get("/transformers/") or found.get("/tests/") or "?"
