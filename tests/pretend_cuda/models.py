"""Models on pretended devices; inside the mode only."""

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel


def on_cuda(model: PreTrainedModel, device: str = "cuda:0") -> PreTrainedModel:
    """The model on one pretended device."""
    return model.to(device)


def over_two(model: PreTrainedModel) -> PreTrainedModel:
    """The model over cuda:0 and cuda:1, as `from_pretrained(device_map=...)` leaves it: with accelerate's own hooks.

    The first half of the layers and all before them lie on cuda:0, the others and all after them on cuda:1. A head that
    shares its weights with the embedding stays with it.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    path = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    )
    places = {f"{path}.{index}": f"cuda:{int(index >= wanted // 2)}" for index in range(wanted)}
    parent: torch.nn.Module = model
    for depth, step in enumerate(path.split(".")):
        prefix = "".join(f"{part}." for part in path.split(".")[:depth])
        children = [name for name, _ in parent.named_children()]
        for place, name in enumerate(children):
            if name != step:
                places[prefix + name] = f"cuda:{int(place > children.index(step))}"
        parent = getattr(parent, step)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        places[head] = "cuda:0"
    return dispatch_model(model, places, main_device="cuda:0", skip_keys=model._skip_keys_device_placement)
