"""A back end from outside the package, in this file alone: registered, asked for, and nothing else knows of it."""

import pytest
import torch

from kvprofile import KVMerger
from kvprofile.errors import UsageError
from kvprofile.runtime.backends.contract import Asked, Backend, Pieces, Recent
from kvprofile.runtime.backends.table import BACKENDS, able
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values


def slot_by_slot(asked: Asked, shelf) -> Pieces:
    """Every slot is a piece of its own: its value, under the softmax of its one logit."""
    everything, filled = slice(0, len(shelf.blocks.owner)), shelf.blocks.filled.long()
    present = torch.arange(shelf.blocks.size) < filled[:, None]
    keys, values, bias = (read(everything)[present] for read in (shelf.keys, shelf.values, shelf.bias))
    owner = shelf.blocks.owner.repeat_interleave(filled)
    logits = (shelf.queries(asked)[owner] * keys[:, None]).sum(-1, keepdim=True)
    logits = asked.softmax.cap_(logits) + bias[:, None, None]
    return Pieces(shelf.output(values[:, None].repeat(1, logits.shape[1], 1)), logits, owner)


def whole_layer(asked: Asked, shelves, recent: Recent, mass: bool):
    """Everything in float64, one row and head at a time: slots, tail, padding and sinks."""
    batch, kv_heads, tail, _ = recent.keys.shape
    output = torch.zeros(*asked.query.shape[:2], recent.values.shape[-1], dtype=torch.float64)
    received = torch.zeros(batch, kv_heads, tail)
    newest = torch.arange(asked.queries).repeat(asked.query.shape[1] // asked.queries) + tail - asked.queries
    for row in range(len(asked.query)):
        place, head = divmod(row, kv_heads)
        keys, values, bias = [], [], []
        for shelf in shelves:
            own = torch.arange(shelf.blocks.size) < shelf.blocks.filled[:, None]
            own &= (shelf.blocks.owner == row)[:, None]
            for found, read in zip((keys, values, bias), (shelf.keys, shelf.values, shelf.bias), strict=True):
                found.append(read()[own])
        hidden = torch.arange(tail) > newest[:, None]
        hidden[:, : recent.unused[place] if recent.unused else 0] = True
        logits = asked.scaled[row].double() @ torch.cat([*keys, recent.keys[place, head]]).double().mT
        logits = asked.softmax.cap_(logits)
        logits[:, :-tail] += torch.cat(bias)
        logits[:, -tail:][hidden] = -1e30
        weights = logits.softmax(-1)
        output[row] = weights @ torch.cat([*values, recent.values[place, head]]).double()
        received[place, head] = weights[:, -tail:].sum(0)
    output = output.view(batch, -1, asked.queries, output.shape[-1]).transpose(1, 2).to(recent.values.dtype)
    return output, received if mass else None


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(BACKENDS, "x-slot-by-slot", Backend("slot by slot", slot_by_slot))
    monkeypatch.setitem(BACKENDS, "x-whole", Backend("whole layers", slot_by_slot, most=7, whole=whole_layer))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_serves_where_it_is_asked_for_and_gives_what_the_others_give(name):
    model = tiny_model(name, attention="eager" if name == "gemma2" else "sdpa")
    text = tiny_text(120, batch=2)
    found = {}
    for backend in ("x-slot-by-slot", "x-whole", "blockwise", "headwise", None):
        merger = KVMerger.from_profile(uniform_values(model, share=0.5), backend=backend).attach(model)
        cache = merger.cache()
        assert cache.backends() == [["stock"]] * 2
        model(text[:, :100], past_key_values=cache)
        found[backend] = [model(text[:, 100:117], past_key_values=cache).logits]
        found[backend] += [model(text[:, at : at + 1], past_key_values=cache).logits for at in (117, 118)]
        full = 0 if name == "gemma2" else 1  # its other layer has a window
        served = backend or able(cache.layers[0].state.shelves[0].facts)[0]
        assert cache.backends() == [[served], [served] if full else ["stock"]]
        merger.detach()
    for others in found.values():
        torch.testing.assert_close(others, found[None], rtol=1e-4, atol=1e-4)


def test_a_name_that_nobody_registered_is_refused_in_one_line():
    profile = uniform_values(tiny_model(), share=0.5)
    with pytest.raises(
        UsageError, match=r"^unknown back end 'kernel'; expected one of triton, varlen, .*, x-slot-by-slot, x-whole$"
    ):
        KVMerger.from_profile(profile, backend="kernel")
