"""A codec from outside the package, in this file alone: registered, named in a plan, and nothing else knows of it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvprofile import KVMerger
from kvprofile.codecs.table import CODECS
from tests.unit.builders import slots_in
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text


class Signs:
    """Every element's sign, a byte each, and the mean of their sizes in float16."""

    name = "x-signs"
    rotated = False

    def nbytes(self, dim: int) -> int:
        return dim + 2

    def encode(self, vectors: Tensor, mean: Tensor | None = None) -> tuple[Tensor, ...]:
        vectors = vectors.float() if mean is None else vectors.float() - mean
        return (vectors > 0).to(torch.int8) * 2 - 1, vectors.abs().mean(-1, keepdim=True).half()

    def decode(self, parts: Sequence[Tensor], dim: int, mean: Tensor | None = None) -> Tensor:
        vectors = parts[0].float() * parts[1].float()
        return vectors if mean is None else vectors + mean


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(CODECS, "x-signs", Signs())


@torch.no_grad()
def test_slots_are_stored_by_it_and_read_by_every_back_end():
    model, text = tiny_model(num_hidden_layers=1), tiny_text(90)
    plan = profile_values(model, [head("streaming", share=0.5, codecs=("x-signs", "x-signs")), head("streaming")])
    plain = profile_values(model, [head("streaming", share=0.5), head("streaming")])
    mean = np.full((1, 2, 16), 0.25, dtype=np.float32)
    caches, logits = {}, {}
    for name in ("plain", "blockwise", "headwise"):
        values, backend = (plain, None) if name == "plain" else (plan, name)
        merger = KVMerger.from_profile(values, backend=backend, arrays={"key_mean": mean}).attach(model)
        caches[name] = merger.cache()
        model(text[:, :80], past_key_values=caches[name])
        logits[name] = model(text[:, 80:], past_key_values=caches[name]).logits
        merger.detach()
    torch.testing.assert_close(logits["blockwise"], logits["headwise"], rtol=1e-4, atol=1e-4)
    as_they_were, found = (slots_in(caches[name].layers[0].state) for name in ("plain", "blockwise"))
    count = found.lengths[0]
    for stored, own, centre in ((found.keys, as_they_were.keys, 0.25), (found.values, as_they_were.values, 0.0)):
        centred = own[:count] - centre
        signs = torch.where(centred > 0, 1.0, -1.0) * centred.abs().mean(-1, keepdim=True)
        torch.testing.assert_close(stored[:count], signs + centre, rtol=1e-3, atol=1e-4)
        assert torch.equal(stored[count:], own[count:])  # the other head is stored as it is
