"""Where accelerate would put a model that is spread over devices, told from its shapes alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def spread(
    model: "PreTrainedModel",
    held: Mapping[str, int],
    *,
    layers: int,
    dtype: "torch.dtype",
    device_map: str,
    max_memory: Mapping[int | str, int | str] | None,
) -> tuple[dict[str, int], str]:
    """Bytes by device, and a note on what could not be known.

    `model` is on the meta device, `held` the bytes of the whole run by what they are for, `layers` how many it has. Weights
    lie where accelerate's own placement puts them, a layer's part of the cache beside them; what a stage works with counts on
    every device, since every device has its turn.
    """
    import accelerate
    import torch

    if max_memory is None and not torch.cuda.is_available():
        total = held["weights"] + held["cache"] + held["working"]
        return {"cpu": total}, "no CUDA device is here, so the whole model is counted for the CPU"
    model = model.to(dtype)
    whole = model._no_split_modules
    limits = dict(max_memory) if max_memory is not None else accelerate.utils.get_max_memory()
    if device_map != "sequential":
        limits = accelerate.utils.get_balanced_memory(
            model, limits, no_split_module_classes=whole, dtype=dtype, low_zero=device_map == "balanced_low_0"
        )
    model.tie_weights()
    placed = accelerate.infer_auto_device_map(model, limits, no_split_module_classes=whole, dtype=dtype)
    weights = accelerate.utils.compute_module_sizes(model, dtype=dtype)
    found: dict[str, int] = {}
    beside: dict[str, int] = {}
    for module, where in placed.items():
        name = _named(where)
        found[name] = found.get(name, 0) + weights[module]
        beside[name] = beside.get(name, 0) + _layers(model, module)
    for name in found:
        if name != "disk":
            found[name] += held["cache"] * beside[name] // layers + held["working"]
    return found, "as accelerate would place it within the memory that is free now"


def _named(where: Any) -> str:
    return f"cuda:{where}" if isinstance(where, int) else str(where)


def _layers(model: "PreTrainedModel", module: str) -> int:
    """How many decoder layers a module of the placement is or holds."""
    from kvprofile.calibration.hidden_states import decoder_layers

    kept = model.get_submodule(module) if module else model
    inside = {id(part) for part in kept.modules()}
    return sum(id(layer) in inside for layer, _ in decoder_layers(model))
