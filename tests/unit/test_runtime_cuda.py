"""The runtime on pretended CUDA devices: budgets of host syncs, and the same numbers on one device and on two."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from kvprofile import KVMerger
from kvprofile.calibration.observe import observing
from kvprofile.errors import KVProfileError
from kvprofile.profile.fingerprint import model_facts
from kvprofile.runtime.settings import CHUNK
from tests.pretend_cuda import PretendCuda, on_cuda, over_two
from tests.unit.architectures import build
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

# The policies that `--policy auto` chooses among.
POLICIES = ("value-attention", "gather-mended", "zsmerge", "attention", "snapkv-128")
# By the kinds of attention: the kernel's and, where logits are capped, the other; sinks, sliding layers, shared keys.
ARCHITECTURES = ("Llama", "Qwen3", "Gemma 2", "Gemma 3n", "GPT-OSS")
A_FORWARD = 2  # syncs; one is ours, for the padding


def planned(model: PreTrainedModel) -> dict:
    """Every head under a policy of its own, as in the profiles that are shipped."""
    facts = model_facts(model.config)
    full = [layer for layer, kind in enumerate(facts["attention"]) if kind == "full_attention"]
    kv_heads = facts["kv_heads"]
    heads = {
        layer: [
            head(POLICIES[(layer * kv_heads + index) % len(POLICIES)], share=0.4 + 0.1 * index)
            for index in range(kv_heads)
        ]
        for layer in full
    }
    return profile_values(model, heads)


def padded(tokens: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A text, and the mask of a batch of which every row but the first is padded."""
    text = tiny_text(tokens, batch=batch)
    hidden = torch.tensor([20 * row for row in range(batch)])
    return text.to(device), (torch.arange(tokens) >= hidden[:, None]).to(device)


@torch.no_grad()
def forwards(model, merger, text, mask):
    """The logits of every forward: the prompt, a token, a piece, and tokens of which the second has a chunk merged."""
    cache, seen = merger.cache(), 0
    for count in (text.shape[1] - CHUNK - 1, 1, CHUNK - 3, 1, 1, 1):
        step, seen = slice(seen, seen + count), seen + count
        yield model(text[:, step], attention_mask=mask[:, :seen], past_key_values=cache, logits_to_keep=1).logits


def syncs_of(gpu: PretendCuda, model: PreTrainedModel, *, prompt: int, batch: int) -> list[int]:
    """How often the host waited in every forward, transformers' own waits in its modelling code aside."""
    text, mask = padded(prompt + CHUNK + 1, batch, "cuda")
    merger = KVMerger.from_profile(planned(model)).attach(model)
    counts = []
    gpu.forget()
    for logits in forwards(model, merger, text, mask):
        own = {where: count for where, count in gpu.syncs.items() if not where.startswith("models/")}
        assert bool(logits.inner.isfinite().all())
        counts.append(sum(own.values()))
        gpu.forget()
    return counts


def check_budget(counts: list[int]) -> None:
    assert counts[0] <= A_FORWARD + 2, counts  # transformers asks for every kind of mask it builds
    assert max(counts[1:]) <= A_FORWARD, counts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_host_waits_at_most_twice_a_forward_however_many_layers(gpu, name):
    check_budget(syncs_of(gpu, on_cuda(build(name).to(torch.bfloat16)), prompt=150, batch=3))


def test_so_it_does_in_a_prompt_of_2048_tokens_with_three_heads_a_layer(gpu):
    shape = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 5}
    check_budget(syncs_of(gpu, on_cuda(tiny_model(**shape).to(torch.bfloat16)), prompt=2048, batch=1))


# Layers that read other layers' keys have to lie on one device with them.
@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_device_and_two_give_the_processor_s_numbers(gpu, name):
    model = build(name)
    text, mask = padded(150, 3, "cpu")
    merger = KVMerger.from_profile(planned(model)).attach(model)
    expected = torch.cat(list(forwards(model, merger, text, mask)), 1)
    merger.detach()
    for place in (on_cuda,) if name == "Gemma 3n" else (on_cuda, over_two):
        there = place(copy.deepcopy(model))
        merger = KVMerger.from_profile(planned(there)).attach(there)
        found = torch.cat(list(forwards(there, merger, text.to("cuda"), mask.to("cuda"))), 1)
        assert torch.equal(found.cpu(), expected)


@torch.no_grad()
def test_a_mask_is_built_once_and_copied_once_to_every_device(gpu):
    model = over_two(tiny_model(num_hidden_layers=6))
    merger = KVMerger.from_profile(planned(model)).attach(model)
    text, mask = padded(60, 2, "cuda")
    gpu.forget()
    model(text, attention_mask=mask, past_key_values=merger.cache())
    copies = {where: count for where, count in gpu.launches.items() if where.startswith("runtime/masks.py")}
    assert sum(count for where, count in copies.items() if where.endswith("copy between devices")) == 1, copies


@torch.no_grad()
def test_beams_are_followed_with_one_question(gpu):
    model = on_cuda(tiny_model(num_hidden_layers=4))
    merger = KVMerger.from_profile(planned(model)).attach(model)
    cache = merger.cache()
    text, mask = padded(100, 3, "cuda")
    model(text, attention_mask=mask, past_key_values=cache)
    order = torch.tensor([2, 0, 0]).to("cuda")
    gpu.forget()
    cache.reorder_cache(order)
    assert gpu.syncs.total() == 1, gpu.syncs


@pytest.mark.usefixtures("gpu")
def test_shared_keys_that_another_device_needs_are_refused_before_anything_is_wrong():
    """Accelerate moves the keys that layers share, and the copy is nobody's cache: such layers had the stock attention."""
    alone = on_cuda(build("Gemma 3n"))
    KVMerger.from_profile(planned(alone)).attach(alone).detach()
    model = over_two(build("Gemma 3n"))
    before = model.config._attn_implementation
    with pytest.raises(KVProfileError, match=r"keys that no cache holds.*on one device"):
        KVMerger.from_profile(planned(model)).attach(model)
    assert model.config._attn_implementation == before
    with pytest.raises(KVProfileError, match="on one device"), observing(model):
        pass
    assert model.config._attn_implementation == before
