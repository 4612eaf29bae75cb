"""Whether gradients pass through a model's weights: quantised ones do or do not, depending on how they are multiplied."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvprofile.calibration.hidden_states import decoder_layers
from kvprofile.calibration.observe import observing
from kvprofile.errors import KVProfileError

TOKENS = 8


def check_gradients(model: Any) -> None:
    """Read a few tokens and ask every module that multiplies by weights whether a gradient passes through it.

    Each is asked alone: past a module that lets none through, the residual stream still carries one, and what is measured
    would be wrong without an error. Raises KVProfileError, naming the first such module.
    """
    blocked: list[str] = []
    handles = [
        module.register_forward_hook(_asking(name, blocked.append), with_kwargs=True)
        for name, module in _multiplying(model)
    ]
    try:
        with observing(model) as observer:
            observer.read(torch.arange(1, TOKENS + 1), lambda *_: None, grad=True)
    finally:
        for handle in handles:
            handle.remove()
    if blocked:
        raise KVProfileError(
            f"no gradient passes through {blocked[0]}, and what merging damages is measured by gradients; calibrate the model "
            "with weights that are not quantised, its profile fits this one, or measure none: --policy gauss --rule uniform"
        )


def _multiplying(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the decoder layers, and the head, that hold a matrix of their own, however it is packed."""
    inside = {id(part) for layer, _ in decoder_layers(model) for part in layer.modules()}
    inside.add(id(model.get_output_embeddings()))  # type: ignore[operator]
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if id(module) in inside and any(tensor.ndim >= 2 for tensor in own):
            yield name, module


def _asking(name: str, tell: Callable[[str], None]) -> Callable[..., None]:
    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken = [one for one in _floating((*args, *kwargs.values())) if one.requires_grad]
        given = list(_floating(output if isinstance(output, tuple) else (output,)))
        if taken and given and not _passes(taken, given):
            weight = type(getattr(module, "weight", None)).__name__
            tell(f"{name} ({type(module).__name__}{f' of {weight}' if weight.endswith('Tensor') else ''})")

    return ask


def _passes(taken: list[Tensor], given: list[Tensor]) -> bool:
    """Whether a gradient of what a module gives reaches what it takes; nothing is known where it gives zeros."""
    graded = [one for one in given if one.requires_grad]
    if not graded:
        return False
    try:
        gradients = torch.autograd.grad(
            graded, taken, [one.detach() for one in graded], retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # also NotImplementedError: a kernel without a backward
        return False
    reached = [one for one in gradients if one is not None]
    return bool(reached) and (any(bool(one.any()) for one in reached) or not any(bool(one.any()) for one in graded))


def _floating(values: Iterable[Any]) -> Iterator[Tensor]:
    return (one for one in values if isinstance(one, Tensor) and one.is_floating_point())
