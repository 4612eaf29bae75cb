"""With merging, logits equal those of a float64 reference that replays the documented rules token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprofile import KVMerger
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.sets import MAX_SET
from tests.unit.builders import slots_in
from tests.unit.merge_reference import REPLAYED, read, reference_logits, relative_error
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

PROMPT, DECODED = 144, 48  # a multiple of MASS_STRIDE; long enough that the tail is merged again

# Two thresholds for every affinity: about half of the tokens of these random models give up their slots.
THRESHOLDS = {
    "cosine": (0.05, 0.2),
    "displacement": (-5.0, -15.0),
    "mass": (-0.6, -0.3),
    "idle": (-0.6, -0.3),
    "value-attention": (-0.6, -0.3),
    "window": (-0.9, -0.6),
    "long-window": (-0.9, -0.6),
    "age": (0.55, 0.4),
}


@torch.no_grad()
def check_against_reference(
    model: PreTrainedModel, profile: dict[str, Any], text: Tensor, cuts: list[int], merges: int = 2
) -> None:
    expected, layers = reference_logits(model, profile, text, cuts)
    merger = KVMerger.from_profile(profile).attach(model)
    cache = merger.cache()
    actual = read(model, cache, text, cuts)
    merger.detach()
    assert relative_error(actual[:, : cuts[0]], expected[:, : cuts[0]]) < 1e-5
    assert relative_error(actual[:, cuts[0] :], expected[:, cuts[0] :]) < 1e-5
    merged = [entry["layer"] for entry in profile["plan"]["layers"]]
    held = {index: [len(one.slots) + len(one.tail) for one in layers[index].heads or []] for index in merged}
    assert {index: cache.slots()[index][0] for index in merged} == held
    # The comparison means something: slots were given up, after the prompt and again later, and it shows.
    assert all(layers[index].merges >= merges for index in merged)
    assert sum(map(sum, held.values())) < 0.9 * sum(map(len, held.values())) * text.shape[1]
    assert relative_error(actual, model(text).logits) > 1e-3


def planned(model: PreTrainedModel, policy: str, mode: str) -> dict[str, Any]:
    """A plan for a model with two KV heads, each with its own threshold and share."""
    low, high = THRESHOLDS[POLICIES[policy].affinity]
    # Shares whose sum never falls half-way between two whole numbers of slots.
    heads = [head(policy, epsilon=low, share=0.553), head(policy, epsilon=high, share=0.718)]
    return profile_values(model, heads, mode=mode)


def change_policy(profile: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change fields of the one policy of a profile."""
    policy = profile["policies"]["gauss"]
    for field, value in changes.items():
        policy[field] = {**policy[field], **value} if isinstance(value, dict) else value


@pytest.mark.parametrize("mode", ["exact", "threshold"])
@pytest.mark.parametrize("policy", REPLAYED)
def test_every_policy_equals_the_reference(policy, mode):
    model = tiny_model()
    check_against_reference(model, planned(model, policy, mode), tiny_text(PROMPT + DECODED), [PROMPT])


@pytest.mark.parametrize("mode", ["exact", "threshold"])
@pytest.mark.parametrize(
    "policies",
    [
        ["gauss", "h2o", "snapkv", "streaming"],
        ["pivot", "average", "kvmerger", "snapkv-128"],
        ["absorb", "value-attention", "attention", "streaming"],
    ],
)
def test_heads_with_policies_of_their_own_equal_the_reference(policies, mode):
    model = tiny_model(num_key_value_heads=4)
    heads = [
        head(policy, epsilon=THRESHOLDS[POLICIES[policy].affinity][0], share=share)
        for policy, share in zip(policies, [0.6, 0.85, 0.75, 0.52], strict=True)
    ]
    plan = profile_values(model, {0: heads, 1: heads[::-1]}, mode=mode)
    check_against_reference(model, plan, tiny_text(PROMPT + DECODED), [PROMPT])


@pytest.mark.parametrize("policy", ["gauss", "h2o"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma3", "gemma2"])
def test_every_model_equals_the_reference(name, policy):
    # sdpa knows no soft cap, Gemma 2 needs eager attention.
    model = tiny_model(name, attention="eager" if name == "gemma2" else "sdpa")
    check_against_reference(model, planned(model, policy, "exact"), tiny_text(PROMPT + DECODED), [PROMPT])


@pytest.mark.parametrize("policy", ["gauss", "snapkv", "kvmerger", "streaming"])
@pytest.mark.parametrize("cuts", [[96, 112, 192], [16, 32, 48, 64, 80, 144]], ids=["long pieces", "short pieces"])
def test_a_prompt_read_in_pieces_equals_the_reference(policy, cuts):
    model = tiny_model()
    check_against_reference(model, planned(model, policy, "exact"), tiny_text(230), cuts)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "complete"},
        {"rule": "anchor"},
        {"combination": {"sigma": "mean"}},
        {"combination": {"sigma": 2.0, "bias": "none"}},
        {"combination": {"scale_values": True}},
        {"combination": {"weights": "average", "keep_pivot_key": True}},
        {"combination": {"weights": "pivot", "bias": "none"}},
        {"combination": {"weights": "attention", "bias": "attention"}},
        {"combination": {"sigma": 2.0, "bias": "attention", "keep_pivot_key": True}},
        {"combination": {"weights": "average", "bias": "attention"}, "affinity": "value-attention"},
        {"affinity": "window", "rule": "drop", "protection": {"heavy_share": 0.1}},
        {"affinity": "displacement", "protection": {"recent_share": 0.3, "heavy_share": 0.1}},
        {"affinity": "age"},
        {"protection": {"first": 0, "recent": 0}},
        {"protection": {"first": 40}},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["exact", "threshold"])
def test_settings_without_a_name_equal_the_reference(changes, mode):
    model = tiny_model()
    low, high = THRESHOLDS[changes.get("affinity", "cosine")]
    heads = [head("gauss", epsilon=low, share=0.553), head("gauss", epsilon=high, share=0.718)]
    plan = profile_values(model, heads, mode=mode)
    change_policy(plan, changes)
    check_against_reference(model, plan, tiny_text(PROMPT + DECODED), [PROMPT])


@pytest.mark.parametrize(("rule", "longest"), [("chain", 204), ("anchor", MAX_SET), ("complete", MAX_SET)])
@torch.no_grad()
def test_sets_of_the_largest_size_equal_the_reference(rule, longest):
    model, text = tiny_model(), tiny_text(290)
    # Every cosine is at least -1: all 240 - 32 - 4 tokens between the first and the recent ones may join.
    plan = profile_values(model, [head(epsilon=-1.0), head(epsilon=-1.0)], mode="threshold")
    change_policy(plan, {"rule": rule})
    check_against_reference(model, plan, text, [240])
    merger = KVMerger.from_profile(plan).attach(model)
    cache = merger.cache()
    model(text[:, :240], past_key_values=cache)
    sizes = slots_in(cache.layers[0].state).bias.exp().round().long().tolist()
    assert max(sizes) == longest
    assert sum(sizes) == 2 * (240 - 32)


@pytest.mark.parametrize("merged", [0, 1])
def test_a_layer_that_keeps_all_beside_one_that_merges(merged):
    model, text = tiny_model(), tiny_text(PROMPT + DECODED)
    plans = {merged: [head(share=0.553), head(share=0.718)], 1 - merged: [head(), head()]}
    plan = profile_values(model, plans)
    check_against_reference(model, plan, text, [PROMPT])


@torch.no_grad()
def test_a_head_that_keeps_all_beside_one_that_merges():
    model, text = tiny_model(), tiny_text(PROMPT + DECODED)
    for mode in ("exact", "threshold"):
        plan = profile_values(model, [head(), head(share=0.6, epsilon=0.05)], mode=mode)
        check_against_reference(model, plan, text, [PROMPT])


@torch.no_grad()
def test_the_prompt_itself_is_read_exactly():
    model, text = tiny_model(), tiny_text(PROMPT)
    merger = KVMerger.from_profile(planned(model, "gauss", "exact"))
    expected = model(text).logits
    merger.attach(model)
    cache = merger.cache()
    assert torch.equal(model(text, past_key_values=cache).logits, expected)
    assert cache.slots()[0][0][0] < 0.6 * PROMPT


@pytest.mark.parametrize("policy", ["gauss", "h2o"])
@torch.no_grad()
def test_every_query_counts_once_however_the_text_arrives(policy):
    model, text = tiny_model(), tiny_text(48)
    merger = KVMerger.from_profile(planned(model, policy, "exact")).attach(model)
    for cuts in ([48], [16, 32, 48], [32]):
        cache = merger.cache()
        read(model, cache, text, cuts)
        # Two query heads share a KV head, and the attention of each of the 48 queries sums to one.
        assert float(cache.layers[0].state.mass.sum()) == pytest.approx(2 * 2 * 48, rel=0.01), cuts


@pytest.mark.parametrize(("policy", "share"), [("kvmerger", 0.3), ("kvmerger", 0.2), ("gauss", 0.05)])
def test_sets_joined_over_protected_tokens_equal_the_reference(policy, share):
    model = tiny_model()
    plan = profile_values(model, [head(policy, epsilon=0.05, share=share)] * 2)
    check_against_reference(model, plan, tiny_text(PROMPT + DECODED), [PROMPT])
