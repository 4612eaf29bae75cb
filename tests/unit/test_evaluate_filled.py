"""A context read once gives every method the very cache that its own reading would have given."""

import pytest
import torch
from transformers import DynamicCache

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.fidelity import fill, read_parts
from kvprofile.evaluate.filled import Filled
from kvprofile.evaluate.methods import Method
from kvprofile.merging.policies import POLICIES
from kvprofile.runtime.cache import MergedCache
from tests.unit.architectures import SUPPORTED, build
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text, uniform_values


def compressed(model, plan, context):
    """The reference: the method's cache filled by a forward of its own."""
    merger = KVMerger.from_profile(plan).attach(model)
    cache = fill(model, merger.cache(), context)
    rows = read_parts(model, cache, [tiny_text(30, seed=1)[0]])
    merger.detach()
    return cache, rows[0]


def assert_same(found, expected):
    assert found.slots() == expected.slots()
    assert found.nbytes() == expected.nbytes()
    for own, other in zip(found.layers, expected.layers, strict=True):
        merged = own in found.merged
        parts, others = (one.tensors() if merged else [one.keys, one.values] for one in (own, other))
        # A layer that reads another one's keys has none.
        assert [part is None for part in parts] == [part is None for part in others]
        pairs = [pair for pair in zip(parts, others, strict=True) if pair[0] is not None]
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_recorded_reading_is_compressed_as_a_reading_of_its_own(name):
    model, context = build(name), tiny_text(200)[0]
    kv_heads = KVMerger.from_profile(uniform_values(model)).settings.facts["kv_heads"]
    mixed = [head(("snapkv", "gather-mended")[index % 2], share=0.3 + 0.2 * (index % 3)) for index in range(kv_heads)]
    filled = Filled(model, context)
    for plan in (profile_values(model, mixed), uniform_values(model, "absorb", share=0.4)):
        expected, rows = compressed(model, plan, context)
        with filled.cache(Method("method", 0.5, plan)) as cache:
            assert_same(cache, expected)
            assert torch.equal(read_parts(model, cache, [tiny_text(30, seed=1)[0]])[0], rows)
            # Read on, it changes; the record does not.
            fill(model, cache, tiny_text(90, seed=2)[0])
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_finds_what_it_needs_in_the_record(policy):
    model, context = tiny_model(), tiny_text(160)[0]
    filled = Filled(model, context)
    plan = uniform_values(model, policy, epsilon=0.75, share=0.5)
    with filled.cache(Method(policy, 0.5, plan)) as cache:
        assert_same(cache, compressed(model, plan, context)[0])


def test_layers_that_keep_all_and_the_full_cache():
    model, context = tiny_model(), tiny_text(120)[0]
    filled = Filled(model, context)
    whole = uniform_values(model, "h2o", share=1.0)
    with filled.cache(Method("kept", 1.0, whole)) as cache:
        assert_same(cache, compressed(model, whole, context)[0])
        kept = cache.layers[0].keys
        fill(model, cache, tiny_text(20)[0])
    with filled.cache(Method("full", 1.0, None)) as cache:
        assert isinstance(cache, DynamicCache)
        assert not isinstance(cache, MergedCache)
        assert torch.equal(cache.layers[0].keys, kept[:, :, :120])


def test_a_cache_that_has_merged_cannot_be_handed_on():
    model, context = tiny_model(), tiny_text(120)[0]
    merger = KVMerger.from_profile(uniform_values(model, "h2o", share=0.5)).attach(model)
    cache = fill(model, merger.cache(), context)
    with pytest.raises(KVProfileError, match="read in one forward"):
        merger.cache().adopt(cache)
    pieces = merger.cache()
    for layer in pieces.merged:
        layer.activate_past_recording()
    fill(model, fill(model, pieces, context[:60]), context[60:])
    with pytest.raises(KVProfileError, match="read in one forward"):
        merger.cache().adopt(pieces)
