"""The tensor that pretends: a CPU tensor inside, a device written on it, every operation watched."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretend_cuda.blocking import MOVES, TAKES_HOST_INDEX, launches, waits

CPU = torch.device("cpu")


class MixedDevicesError(RuntimeError):
    """Tensors of different devices met in one operation, as CUDA refuses."""


class Watcher(Protocol):
    """Who is told what happens."""

    def launched(self, what: str) -> None:
        """A kernel or a copy was launched."""

    def waited(self, what: str) -> None:
        """The host waited for the device."""


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies or pretends to."""
    return tensor.place if isinstance(tensor, PretendTensor) else tensor.device


def inner_of(value: Any) -> Any:
    """The CPU tensor inside; anything else as it is."""
    return value.inner if isinstance(value, PretendTensor) else value


class PretendTensor(Tensor):
    """A CPU tensor on a pretended CUDA device. `watcher`, where set, is told of every launch and every wait.

    C++ takes it for a CPU tensor, so that every operation finds a kernel; Python sees its `device`.
    """

    inner: Tensor
    place: torch.device
    watcher: Watcher | None = None

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> "PretendTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
        )
        tensor.inner, tensor.place = inner, place
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.place.index

    def __repr__(self) -> str:
        return f"PretendTensor({self.inner}, {self.place})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = PretendTensor(self.inner.detach().clone(), self.place)
            kept = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if kept else copy
        return memo[id(self)]

    def tolist(self) -> Any:
        _told("waited", "tolist")
        return self.inner.tolist()

    def numpy(self, **_options: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _common_device(function, args, kwargs)
        _count(function, args, kwargs)
        inner = _run(function, tree_map(inner_of, args), tree_map(inner_of, kwargs))
        if function is torch.ops.aten.copy_.default and not isinstance(args[0], PretendTensor):
            return args[0]
        out = tree_map(lambda part: PretendTensor(part, place) if isinstance(part, Tensor) else part, inner)
        return return_and_correct_aliasing(function, args, kwargs, out)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    if function is torch.ops.aten.histc.default and not args[0].is_floating_point():
        # Mixtures of experts count integers with it on CUDA, and the CPU has no kernel for that.
        return function(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return function(*args, **kwargs)


def _common_device(function: Any, args: Any, kwargs: Any) -> torch.device:
    """The device an operation runs on. Raises MixedDevicesError where its tensors lie on several.

    As on CUDA, a CPU tensor without dimensions may join in, and an index may come from the CPU.
    """
    tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    devices = {part.place for part in tensors if isinstance(part, PretendTensor)}
    if function in MOVES:
        return tensors[0].place if isinstance(tensors[0], PretendTensor) else devices.pop()
    strays = [part for part in tensors if not isinstance(part, PretendTensor) and part.dim()]
    if function in TAKES_HOST_INDEX and isinstance(tensors[0], PretendTensor):
        strays = []
    if strays or len(devices) > 1:
        shown = ", ".join(f"{tuple(part.shape)} on {device_of(part)}" for part in tensors)
        raise MixedDevicesError(f"{function}: tensors on several devices: {shown}")
    return devices.pop()


def _count(function: Any, args: Any, kwargs: Any) -> None:
    if PretendTensor.watcher is None:
        return
    if launches(function):
        _told("launched", function.overloadpacket.__name__)
    reason = waits(function, args, kwargs, PretendTensor)
    if reason is not None:
        _told("waited", reason)


def _told(event: str, what: str) -> None:
    if PretendTensor.watcher is not None:
        tell: Callable[[str], None] = getattr(PretendTensor.watcher, event)
        tell(what)
