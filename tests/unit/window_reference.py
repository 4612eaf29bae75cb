"""Packed windows once more, in float64 and with plain loops: which token is packed when, and what a query makes of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprofile.codecs.rotation import turn_back
from kvprofile.codecs.table import CODECS
from kvprofile.profile.fingerprint import model_facts
from tests.unit.merge_reference import key_sources, oldest_visible, read_by
from tests.unit.tiny_models import uniform_values

Pair = tuple[str, str]
WINDOWED = ("sliding_attention", "chunked_attention")


def windowed_values(model: PreTrainedModel, pairs: Sequence[Pair], share: float = 1.0) -> dict[str, Any]:
    """A profile's JSON values with these codecs, head after head, in every layer with a window of its own."""
    values, facts = uniform_values(model, share=share), model_facts(model.config)
    own = [{"key_codec": keys, "value_codec": value} for keys, value in pairs]
    heads = [own[head % len(own)] for head in range(facts["kv_heads"])]
    values["plan"]["windows"] = [
        {"layer": layer, "heads": heads} for layer, kind in enumerate(facts["attention"]) if kind in WINDOWED
    ]
    return values


def means_of(model: PreTrainedModel) -> np.ndarray:
    facts = model_facts(model.config)
    shape = facts["layers"], facts["kv_heads"], facts["head_dim"]
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()


def read_back(name: str, vector: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """What a codec gives back of one vector."""
    centre = None if mean is None else torch.from_numpy(mean).float()
    codec, given = CODECS[name], torch.from_numpy(vector).float()
    found = codec.decode(codec.encode(given, centre), len(vector), centre)
    return (turn_back(found) if codec.rotated else found).double().numpy()


class ReferenceWindow:
    """One layer: all its tokens, exact and as stored, and how many of the oldest are stored by now."""

    def __init__(self, pairs: Sequence[Pair], means: np.ndarray, window: int, oldest) -> None:
        self.pairs, self.means, self.window, self.oldest = pairs, means, window, oldest
        self.exact: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in pairs]
        self.stored: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in pairs]
        self.packed = 0

    def attend(self, query, keys, values, *, scaling, softcap, sinks):
        """One forward's output `(heads, queries, dim)`; arrays `(heads, tokens, dim)`."""
        heads, queries, _ = query.shape
        group, before = heads // len(keys), len(self.exact[0])
        for head, pair in enumerate(self.pairs):
            for key, value in zip(keys[head], values[head], strict=True):
                self.exact[head].append((key, value))
                self.stored[head].append((read_back(pair[0], key, self.means[head]), read_back(pair[1], value, None)))
        output = np.zeros((heads, queries, values.shape[-1]))
        for head in range(heads):
            for place in range(queries):
                own, position = head // group, before + place
                seen = range(max(0, self.oldest(position)), position + 1)
                shown = [(self.stored if token < self.packed else self.exact)[own][token] for token in seen]
                logits = np.array([query[head, place] @ key for key, _ in shown]) * scaling
                logits = logits if softcap is None else np.tanh(logits / softcap) * softcap
                weights = np.exp(logits - logits.max())
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - logits.max()))
                output[head, place] = (
                    sum(weight * value for weight, (_, value) in zip(weights, shown, strict=True)) / total
                )
        count = before + queries
        tail = min(count - self.packed, self.window - 1)
        if tail >= 64:
            self.packed = count - 32
        return output


@torch.no_grad()
def window_logits(model: PreTrainedModel, pairs: Sequence[Pair], text: Tensor, cuts: list[int], window: int) -> Tensor:
    """The model's logits for one row read in pieces, with every layer's attention in float64."""
    facts, means, sources = model_facts(model.config), means_of(model), key_sources(model)
    heads = [pairs[head % len(pairs)] for head in range(facts["kv_heads"])]
    plain = [("none", "none")] * facts["kv_heads"]
    layers = [
        ReferenceWindow(heads, means[index], window, oldest_visible(model.config, kind))
        if kind in WINDOWED
        else ReferenceWindow(plain, means[index], 10**6, lambda _position: 0)
        for index, kind in enumerate(facts["attention"])
    ]

    def attention(module, query, key, value, _mask, *, scaling=None, softcap=None, s_aux=None, **_options):
        assert sources[module.layer_idx] == module.layer_idx  # layers that share keys are tested elsewhere
        arrays = (part[0].double().numpy() for part in (query, key, value))
        sinks = None if s_aux is None else s_aux.double().numpy()
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = layers[module.layer_idx].attend(*arrays, scaling=scaling, softcap=softcap, sinks=sinks)
        return torch.from_numpy(output).to(query.dtype)[None].transpose(1, 2), None

    return read_by(attention, model, text, cuts)
