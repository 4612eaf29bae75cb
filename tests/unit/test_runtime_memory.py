"""Slots and bytes: what the plan asks for is what is stored, and what is reported is what is alive."""

import gc
import math
import weakref
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Lfm2Config, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from kvprofile import KVMerger
from kvprofile.merging.policies import POLICIES
from kvprofile.runtime.block_size import block_size
from kvprofile.runtime.cache import MergedCache, allocated_bytes
from kvprofile.runtime.settings import CHUNK
from tests.unit.merge_reference import REPLAYED, read
from tests.unit.tiny_models import VOCAB, head, profile_values, random_model, tiny_model, tiny_text, uniform_values

# One epsilon for every affinity, used by the anchor policies and in threshold mode.
EPSILON = {"cosine": 0.05, "displacement": -5.0, "age": 0.5}
EPSILON |= dict.fromkeys(("mass", "idle", "value-attention", "window", "long-window"), -0.5)


@pytest.fixture(autouse=True, scope="module")
def _young_heap() -> Iterator[None]:
    """Hide what exists already from the garbage collector: walking it takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all distinct tensor storages made by this file and alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def fill(model: PreTrainedModel, cache: MergedCache, text: Tensor, prompt: int) -> None:
    """Read a text whose first `prompt` tokens come at once, and keep nothing but the cache."""
    model(text[:, :prompt], past_key_values=cache, logits_to_keep=1)
    for position in range(prompt, text.shape[1]):
        model(text[:, position : position + 1], past_key_values=cache, logits_to_keep=1)


def wanted_slots(shares: list[float], tokens: int) -> list[int]:
    """Largest remainders in exact arithmetic."""
    wanted = [Fraction(str(share)) * tokens for share in shares]
    whole = [math.floor(one) for one in wanted]
    order = sorted(range(len(shares)), key=lambda index: (whole[index] - wanted[index], index))
    for index in order[: round(sum(wanted) - sum(whole))]:
        whole[index] += 1
    return whole


@pytest.mark.parametrize("policy", REPLAYED)
@pytest.mark.parametrize("tokens", [160, 321])
@torch.no_grad()
def test_every_head_gets_its_slots(policy, tokens):
    shares = [0.55, 0.9, 0.613, 1.0]
    model = tiny_model(num_key_value_heads=4)
    epsilon = EPSILON[POLICIES[policy].affinity]
    plan = profile_values(model, [head(policy, epsilon=epsilon, share=share) for share in shares])
    cache = KVMerger.from_profile(plan).attach(model).cache()
    model(tiny_text(tokens, batch=2), past_key_values=cache)
    assert cache.slots() == [[wanted_slots(shares, tokens)] * 2] * 2
    assert cache.get_seq_length() == tokens


@pytest.mark.parametrize(
    "policies",
    [("gauss", "pivot"), ("h2o", "snapkv"), ("absorb", "value-attention"), ("streaming", "average"), ("kvmerger",) * 2],
)
@torch.no_grad()
def test_slots_stay_within_a_chunk_of_the_plan(policies):
    model, text, shares = tiny_model(), tiny_text(360), (0.5, 0.65)
    heads = [
        head(policy, epsilon=EPSILON[POLICIES[policy].affinity], share=share)
        for policy, share in zip(policies, shares, strict=True)
    ]
    cache = KVMerger.from_profile(profile_values(model, heads)).attach(model).cache()
    model(text[:, :160], past_key_values=cache)
    for seen in range(161, 361):
        model(text[:, seen - 1 : seen], past_key_values=cache)
        assert cache.get_seq_length() == seen
        for layer in cache.slots():
            for slots, share in zip(layer[0], shares, strict=True):
                assert share * seen - 1 <= slots <= share * seen + CHUNK + 1


@torch.no_grad()
def test_a_short_prompt_is_kept_until_enough_has_aged():
    model, text = tiny_model(), tiny_text(100)
    cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
    model(text[:, :20], past_key_values=cache)
    for seen in range(21, 64):
        model(text[:, seen - 1 : seen], past_key_values=cache)
        assert cache.slots() == [[[seen, seen]]] * 2
    model(text[:, 63:64], past_key_values=cache)
    # 32 recent tokens are protected, and the 32 before them have aged: the first merge leaves what the plan asks for,
    # or as little as the protected tokens allow: 4 first, 1 set of 28, 32 recent.
    assert cache.slots() == [[[37, 37]]] * 2


def check_bytes(model: PreTrainedModel, plan: dict[str, Any], prompt: int, decoded: int) -> None:
    text = tiny_text(prompt + decoded, batch=2)
    merger = KVMerger.from_profile(plan).attach(model)
    fill(model, merger.cache(), text[:, :2], 1)  # whatever is made at first use exists from here on
    before = live_bytes()
    cache = merger.cache()
    fill(model, cache, text, prompt)
    assert cache.nbytes() == live_bytes() - before
    del cache
    assert live_bytes() == before


@pytest.mark.parametrize("mode", ["exact", "threshold"])
@pytest.mark.parametrize("policy", ["gauss", "h2o", "streaming", "kvmerger"])
@pytest.mark.parametrize(("prompt", "decoded"), [(100, 0), (350, 0), (350, 50), (20, 10)])
def test_the_bytes_reported_are_the_bytes_alive(policy, mode, prompt, decoded):
    model = tiny_model()
    epsilon = EPSILON[POLICIES[policy].affinity]
    check_bytes(model, uniform_values(model, policy, mode=mode, epsilon=epsilon, share=0.5), prompt, decoded)


@pytest.mark.parametrize(("prompt", "decoded"), [(20, 10), (350, 50)])
def test_the_bytes_reported_count_the_sliding_layers_too(prompt, decoded):
    model = tiny_model("gemma3")
    check_bytes(model, uniform_values(model, share=0.5), prompt, decoded)


def test_the_bytes_reported_count_the_linear_layers_too():
    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = random_model(config)
    check_bytes(model, uniform_values(model, share=0.5), 150, 10)


@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "reset"])
def test_the_bytes_reported_are_the_bytes_alive_after_rows_moved(change):
    model, text = tiny_model(), tiny_text(160, batch=3)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    fill(model, merger.cache(), text[:, :2], 1)
    before = live_bytes()
    cache = merger.cache()
    fill(model, cache, text, 150)
    match change:
        case "reorder":
            cache.reorder_cache(torch.tensor([1, 1, 0]))
        case "select":
            cache.batch_select_indices(torch.tensor([2]))
        case "repeat":
            cache.batch_repeat_interleave(2)
        case "reset":
            cache.reset()
    assert cache.nbytes() == live_bytes() - before


@pytest.mark.parametrize("policy", REPLAYED)
@torch.no_grad()
def test_half_the_slots_take_half_the_bytes(policy):
    # One layer with heads as wide as real ones.
    model = tiny_model(num_hidden_layers=1, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    text = tiny_text(2048)
    stock = DynamicCache(config=model.config)
    model(text, past_key_values=stock, logits_to_keep=1)
    full = sum(part.untyped_storage().nbytes() for part in (stock.layers[0].keys, stock.layers[0].values))
    assert full == 2 * 2048 * 64 * 4
    epsilon = EPSILON[POLICIES[policy].affinity]
    plan = uniform_values(model, policy, epsilon=epsilon, share=0.5)
    cache = KVMerger.from_profile(plan).attach(model).cache()
    model(text, past_key_values=cache, logits_to_keep=1)
    assert cache.slots() == [[[1024]]]
    # A bias for every merged slot and a mass for every token of the tail come on top, and room in the last block.
    assert 0.5 * full <= cache.nbytes() <= 0.51 * full + block_size(2048) * 2 * 64 * 4


@torch.no_grad()
def test_the_prompt_is_let_go_layer_by_layer():
    model, text = tiny_model(num_hidden_layers=4), tiny_text(512)
    prompt_bytes = 2 * 512 * 2 * 16 * 4
    cache = KVMerger.from_profile(uniform_values(model, share=0.25)).attach(model).cache()
    held: list[weakref.ref[Tensor]] = []
    sizes = []
    stock_update = cache.update

    def update(key: Tensor, value: Tensor, layer: int, **options) -> tuple[Tensor, Tensor]:
        returned = stock_update(key, value, layer, **options)
        sizes.append(cache.nbytes())
        held.extend(weakref.ref(part) for part in (key, value, *returned))
        held.extend(weakref.ref(part) for part in (cache.layers[layer].keys, cache.layers[layer].values))
        return returned

    cache.update = update
    model(text, past_key_values=cache, logits_to_keep=1)
    gc.collect()
    assert len(held) == 4 * 6
    assert [reference() for reference in held] == [None] * len(held)
    # While layer n is at work the layers before it hold a quarter each, and a block for each of two heads.
    share = 0.3 + block_size(512) / 512
    for layer, size in enumerate(sizes):
        assert size <= prompt_bytes * (1 + share * layer)
    assert cache.nbytes() <= 4 * share * prompt_bytes


@torch.no_grad()
def test_a_growing_text_does_not_grow_the_bytes_beyond_the_plan():
    model, text = tiny_model(head_dim=64), tiny_text(420)
    cache = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model).cache()
    read(model, cache, text, [200])
    per_slot = 2 * 2 * 64 * 4 * 2
    # Slots, a chunk above the plan, a chunk of slack and room for a block; a few bytes of bias and mass beside each.
    assert cache.nbytes() <= 1.02 * per_slot * (0.5 * 420 + 2 * CHUNK + block_size(200) + 1)


@torch.no_grad()
def test_a_long_generation_keeps_its_budget_and_leaves_nothing_behind():
    model, prompt, steps = tiny_model(max_position_embeddings=2048), 1024, 1000
    text = tiny_text(prompt + steps)
    shares = (0.25, 0.5)
    plan = profile_values(model, [head("absorb", share=shares[0]), head("gauss", share=shares[1])])
    merger = KVMerger.from_profile(plan).attach(model)
    fill(model, merger.cache(), text[:, :2], 1)
    before = live_bytes()
    cache = merger.cache()
    model(text[:, :prompt], past_key_values=cache, logits_to_keep=1)
    a_slot = 2 * 2 * 16 * 4  # key and value of 16 floats, in two layers
    for seen in range(prompt + 1, prompt + steps + 1):
        model(text[:, seen - 1 : seen], past_key_values=cache, logits_to_keep=1)
        for layer in cache.slots():
            for slots, share in zip(layer[0], shares, strict=True):
                assert share * seen - 1 <= slots <= share * seen + CHUNK + 1
        # Slots of both heads, a chunk of room in the tail, room for a block and, beside every slot, a bias and what it was
        # looked at.
        assert cache.nbytes() <= 1.07 * a_slot * (sum(shares) * seen + 4 * CHUNK + 2 * block_size(prompt))
        if seen % 250 == 0:
            assert cache.nbytes() == live_bytes() - before
    del cache
    assert live_bytes() == before


@pytest.mark.parametrize("share", [0.02, 0.05])
@torch.no_grad()
def test_a_share_of_less_than_a_slot_a_chunk_is_kept_too(share):
    model, text = tiny_model(num_hidden_layers=1), tiny_text(1200)
    cache = KVMerger.from_profile(uniform_values(model, share=share)).attach(model).cache()
    read(model, cache, text[:, :100], [100])
    excess = []
    for seen in range(104, 1201, 4):
        model(text[:, seen - 4 : seen], past_key_values=cache, logits_to_keep=1)
        excess.append(max(cache.slots()[0][0]) - share * seen)
        # 4 first and 32 recent tokens are protected.
        assert excess[-1] <= max(CHUNK, 1 / share) + 4 + 32 + 1
    # After a merge there is no more than that, at the end as at the beginning.
    assert min(excess[-20:]) <= 4 + 32 + 1


def test_a_stock_cache_of_states_and_keys_counts_both():
    attention, states = DynamicLayer(), LinearAttentionLayer()
    attention.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 8))
    states.update_conv_state(torch.zeros(1, 12, 4))
    assert allocated_bytes(Cache(layers=[attention, states])) == 4 * (2 * 5 * 16 + 2 * 5 * 8 + 12 * 4)
