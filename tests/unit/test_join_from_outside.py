"""A join of a stranger's program that reads the attention mass: it says what it needs, and the runtime measures it."""

import pytest
import torch

from kvprofile import KVMerger
from kvprofile.merging.host import places_of
from kvprofile.merging.joining import JOINS, Join
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import measured
from tests.unit.builders import slots_in
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text


def louder(losses, _combination):
    """Lost tokens are dropped; every survivor counts for as much as attention it got, against the mean of the survivors."""
    tokens = losses.tokens
    kept = places_of(~losses.lost, sum(losses.lengths))
    mass = measured(tokens.mass).flatten().index_select(0, kept).clamp_min(1e-6)
    keys, values = (part.flatten(0, 2).index_select(0, kept) for part in (tokens.keys, tokens.values))
    means = torch.cat([part.mean().expand(len(part)) for part in mass.split(losses.lengths)])
    return Slots(keys, values, (mass / means).log(), losses.lengths)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(JOINS, "x-louder", Join(louder, mass=True, combines=True))
    monkeypatch.setitem(POLICIES, "x-louder", Policy("age", "x-louder"))


@torch.no_grad()
def test_the_mass_it_needs_is_measured_and_its_slots_are_kept():
    assert POLICIES["x-louder"].needs_mass
    assert not Policy("age", "drop").needs_mass
    model, text = tiny_model(num_hidden_layers=1), tiny_text(96)
    found = {}
    for name in ("x-louder", "streaming"):
        merger = KVMerger.from_profile(profile_values(model, [head(name, share=0.5)] * 2)).attach(model)
        cache = merger.cache()
        model(text, past_key_values=cache)
        found[name] = slots_in(cache.layers[0].state)
        assert torch.isfinite(model(text[:, :3], past_key_values=cache).logits).all()
        merger.detach()
    # The same tokens survive, with the same keys; what they count for sets the two apart.
    assert found["x-louder"].lengths == found["streaming"].lengths
    torch.testing.assert_close(found["x-louder"].keys, found["streaming"].keys)
    assert (found["streaming"].bias == 0).all()
    for bias in found["x-louder"].bias.split(found["x-louder"].lengths):
        assert bias.exp().mean() == pytest.approx(1.0, abs=1e-3)
        assert bias.std() > 0.1
