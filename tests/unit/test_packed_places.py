"""Packed slots where their users are: pretended CUDA devices, many query heads a KV head, several threads, long texts."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvprofile import KVMerger
from kvprofile.profile.fingerprint import model_facts
from tests.pretend_cuda import on_cuda, over_two
from tests.unit.architectures import build
from tests.unit.merge_reference import relative_error
from tests.unit.test_runtime_cuda import check_budget, forwards, padded
from tests.unit.tiny_models import head, profile_values, tiny_model, tiny_text

# Heads that merge, drop and keep all; codecs of every family, one of them beside slots as they are.
HEADS = [
    head("gather-mended", share=0.5, codecs=("int8", "int4")),
    head("zsmerge", share=0.4, codecs=("int6", "int3")),
    head("value-attention", codecs=("fp8-e4m3", "turbo3")),
    head("attention", share=0.6, codecs=("none", "int2")),
]


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


def merger_of(model, heads=None, backend=None) -> KVMerger:
    facts = model_facts(model.config)
    heads = heads or [HEADS[index % len(HEADS)] for index in range(facts["kv_heads"])]
    means = np.full((facts["layers"], facts["kv_heads"], facts["head_dim"]), 0.2, dtype=np.float32)
    return KVMerger.from_profile(profile_values(model, heads), backend=backend, arrays={"key_mean": means})


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS"])
def test_one_device_and_two_give_the_processor_s_numbers(gpu, name):
    model = build(name)
    text, mask = padded(150, 3, "cpu")
    merger = merger_of(model).attach(model)
    expected = torch.cat(list(forwards(model, merger, text, mask)), 1)
    merger.detach()
    for place in (on_cuda, over_two):
        there = place(copy.deepcopy(model))
        merger = merger_of(there).attach(there)
        found = torch.cat(list(forwards(there, merger, text.to("cuda"), mask.to("cuda"))), 1)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("layers", [2, 6])
def test_the_host_waits_at_most_twice_a_forward_however_many_layers(gpu, layers):
    model = on_cuda(tiny_model(num_hidden_layers=layers).to(torch.bfloat16))
    text, mask = padded(182, 3, "cuda")
    merger = merger_of(model).attach(model)
    counts = []
    gpu.forget()
    for logits in forwards(model, merger, text, mask):
        counts.append(sum(count for where, count in gpu.syncs.items() if not where.startswith("models/")))
        assert bool(logits.inner.isfinite().all())
        gpu.forget()
    check_budget(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_seven_query_heads_and_two_threads(dtype):
    model = tiny_model(num_hidden_layers=2, num_attention_heads=14, hidden_size=112).to(dtype)
    assert model.config.num_attention_heads == 7 * model.config.num_key_value_heads
    text, found = tiny_text(170), {}
    torch.set_num_threads(2)
    for backend in ("blockwise", "headwise"):
        merger = merger_of(model, backend=backend).attach(model)
        cache = merger.cache()
        model(text[:, :160], past_key_values=cache, logits_to_keep=1)
        assert cache.slots() == [[[80, 64]]] * 2
        found[backend] = model(text[:, 160:], past_key_values=cache).logits.float()
        merger.detach()
    assert relative_error(found["headwise"], found["blockwise"]) < (1e-4 if dtype == torch.float32 else 0.05)


@torch.no_grad()
def test_a_long_text_keeps_its_budget_and_its_bytes_a_slot():
    model = tiny_model(num_hidden_layers=1, head_dim=64)
    pair = ("int4", "int4")
    merger = merger_of(model, [head("h2o", share=0.5, codecs=pair), head("streaming", codecs=pair)]).attach(model)
    text, cache = tiny_text(900), merger.cache()
    model(text[:, :300], past_key_values=cache, logits_to_keep=1)
    early = cache.nbytes() / sum(cache.slots()[0][0])
    for at in range(300, 900):
        model(text[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
    dropped, kept = cache.slots()[0][0]
    assert kept == 900
    assert 450 <= dropped <= 450 + 34
    # The unpacked tail weighs less and less; a slot never more than it did.
    assert cache.nbytes() / (dropped + kept) < early
    merger.detach()
