"""Turns queries on to later positions, by the model's own rotary embedding: what would be asked if it were asked later."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# Their frequencies go by the length of the text, so that a difference of positions does not tell the angle.
_MOVING = ("dynamic", "longrope")
# Their full-attention layers know no positions.
_PARTLY = ("cohere2", "exaone4")
_CLOSE = 1e-3


@dataclass(frozen=True)
class Rotary:
    """A model's rotary embedding: `embedding` gives cosines and sines of positions, `apply` turns queries by them.

    keywords: what `embedding` wants to know of the layer. width: dimensions of a head that are turned, the first ones.
    """

    embedding: torch.nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    keywords: dict[str, Any]
    width: int

    def turned(self, states: Tensor, by: Tensor) -> Tensor:
        """States `(batch, heads, queries, head_dim)` float32, every query `by` `(queries,)` positions on."""
        cosines, sines = self.embedding.to(states.device)(states, by[None], **self.keywords)
        scale = (cosines.square() + sines.square()).sqrt()  # YaRN's factor is in the states already
        head, rest = states[..., : self.width], states[..., self.width :]
        found, _ = self.apply(head, head, cosines / scale, sines / scale)
        return torch.cat([found, rest], dim=-1)


_known: "WeakKeyDictionary[torch.nn.Module, Rotary | None]" = WeakKeyDictionary()


def rotary_of(module: torch.nn.Module | None) -> Rotary | None:
    """The rotary embedding of an attention module; None where there is none that turns by a difference of positions."""
    if module is None:
        return None
    if module not in _known:
        _known[module] = _found(module)
    return _known[module]


@torch.inference_mode(False)  # it outlives the forward in which it is found
def _found(module: Any) -> Rotary | None:
    """Look for the embedding in the file that the module's class is from: transformers keeps the two together."""
    config, source = getattr(module, "config", None), sys.modules.get(type(module).__module__)
    apply = getattr(source, "apply_rotary_pos_emb", None)
    if config is None or apply is None or not getattr(module, "use_rope", True) or config.model_type in _PARTLY:
        return None
    parameters, keywords = getattr(config, "rope_parameters", None) or {}, {}
    kinds = getattr(config, "layer_types", None) or ()
    if set(parameters) & set(kinds):  # every kind of layer has its own
        keywords = {"layer_type": kinds[module.layer_idx]}
        parameters = parameters.get(kinds[module.layer_idx]) or {}
    if parameters.get("rope_type") in _MOVING:
        return None
    for name, embedding in vars(source).items():
        if name.endswith("RotaryEmbedding") and "Vision" not in name:
            for whole in (True, False):
                found = _tried(embedding, config, apply, keywords, whole)
                if found is not None:
                    return found
    return None


@torch.no_grad()
def _tried(
    embedding: Any, config: Any, apply: Callable[..., Any], keywords: dict[str, Any], whole: bool
) -> Rotary | None:
    """The embedding, if turning by 3 and then by 5 positions turns by 8.

    whole: `apply` is given a head's whole queries, and knows itself what of them it turns.
    """
    try:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        states = torch.randn((1, 1, 1, dim), generator=torch.Generator().manual_seed(0))
        made = embedding(config)
        width = dim if whole else made(states, torch.zeros(1, 1, dtype=torch.long), **keywords)[0].shape[-1]
        rotary = Rotary(made, apply, keywords, width)
        once, twice, both = (torch.tensor([by]) for by in (3, 5, 8))
        found, expected = rotary.turned(rotary.turned(states, once), twice), rotary.turned(states, both)
    except Exception:  # foreign code, which may ask for anything: then queries are not turned
        return None
    moved = (expected - states).abs().max() > _CLOSE
    return rotary if moved and (found - expected).abs().max() < _CLOSE else None
