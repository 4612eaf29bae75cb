"""Models whose weights accelerate keeps on the CPU or on disk: where they take their tokens, and what they hold."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvprofile.errors import KVProfileError

if TYPE_CHECKING:
    import torch


def input_device(model: Any) -> "torch.device":
    """The device of a model's input.

    Of a model that `accelerate` has offloaded to the CPU or to disk the parameters are placeholders on the meta device: a
    hook brings each module's to its execution device when it runs. Raises KVProfileError where there are no weights at all.
    """
    import torch

    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in _hooks(module):
            place = getattr(hook, "execution_device", None)
            if place is not None:
                return torch.device(place)
    raise KVProfileError(
        f"the weights of {type(model).__name__} are on the meta device, so there are none; load the model with its weights"
    )


def offloaded_weight(model: Any, name: str) -> "torch.Tensor | None":
    """A weight of the model's `state_dict` that accelerate has offloaded; None where it has not."""
    path, _, last = name.rpartition(".")
    for hook in _hooks(model.get_submodule(path)):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            found: torch.Tensor = kept[last]
            return found
    return None


def _hooks(module: Any) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))
