"""The probe's attention: against one softmax and autograd in float64, and what its graph keeps of the context."""

import pytest
import torch
from torch import Tensor

from kvprofile.calibration import probe_attention as module
from kvprofile.calibration.observe import observing
from kvprofile.calibration.probe_attention import Surroundings, probe_attention
from kvprofile.merging.softmax import Softmax
from tests.unit.tiny_models import tiny_model, tiny_text

TOKENS, QUERIES, WINDOW = 90, 12, 30


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(window: int | None) -> Tensor:
    """`(queries, tokens + queries)`: what a query sees of the context and of the probe."""
    distance = torch.arange(TOKENS, TOKENS + QUERIES)[:, None] - torch.arange(TOKENS + QUERIES)
    return (distance >= 0) & (distance < (window or TOKENS + QUERIES))


def plain(query: Tensor, key: Tensor, value: Tensor, around: Surroundings, seen: Tensor) -> Tensor:
    """One softmax over everything, keys and values repeated for every query head."""
    group = len(query) // len(key)
    keys = torch.cat([around.keys, key], dim=1).repeat_interleave(group, dim=0)
    values = torch.cat([around.values, value], dim=1).repeat_interleave(group, dim=0)
    logits = query @ keys.transpose(-1, -2) * around.softmax.scaling
    if around.softmax.softcap is not None:
        logits = around.softmax.softcap * torch.tanh(logits / around.softmax.softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    if around.softmax.sinks is not None:
        logits = torch.cat([logits, around.softmax.sinks.view(-1, 1, 1).expand(-1, QUERIES, 1)], dim=-1)
    return (torch.softmax(logits, -1)[..., : values.shape[1]] @ values).transpose(0, 1)


@pytest.mark.parametrize("piece", [1, 37, None], ids=["token by token", "in pieces", "at once"])
@pytest.mark.parametrize(
    "case",
    [
        (2, 2, None, False, None, "nothing"),
        (3, 1, None, True, None, "nothing"),
        (2, 2, None, False, None, "added"),
        (1, 7, None, False, WINDOW, "bool"),
        (2, 3, 2.0, False, WINDOW, "bool"),
        (2, 3, 2.0, True, WINDOW, "added"),
    ],
)
def test_outputs_and_gradients_are_those_of_one_softmax(monkeypatch, case, piece):
    kv_heads, group, softcap, sinks, window, masked = case
    if piece is not None:
        monkeypatch.setattr(module, "PIECE_BYTES", piece * 4 * kv_heads * group * QUERIES)
    probe = [
        drawn(kv_heads * group, QUERIES, 8, seed=1).requires_grad_(),
        drawn(kv_heads, QUERIES, 8, seed=2).requires_grad_(),
        drawn(kv_heads, QUERIES, 6, seed=3).requires_grad_(),
    ]
    seen = visible(window)
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float32).min)
    around = Surroundings(
        drawn(kv_heads, TOKENS, 8, seed=4),
        drawn(kv_heads, TOKENS, 6, seed=5),
        {"nothing": None, "bool": seen, "added": added}[masked],
        Softmax(0.4, softcap, drawn(kv_heads * group, seed=6) if sinks else None),
    )
    weights = drawn(QUERIES, kv_heads * group, 6, seed=7)
    found, expected = probe_attention(*probe, around), plain(*probe, around, seen)
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad((output * weights).sum(), probe) for output in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().amax() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    query, key, value, keys, values = (
        drawn(heads, count, 8, seed=seed).to(dtype)
        for seed, (heads, count) in enumerate([(4, QUERIES), (2, QUERIES), (2, QUERIES), (2, TOKENS), (2, TOKENS)])
    )
    around = Surroundings(keys, values, None, Softmax(0.4))
    exact = Surroundings(keys.double(), values.double(), None, Softmax(0.4))
    expected = plain(query.double(), key.double(), value.double(), exact, visible(None)).to(dtype)
    found = probe_attention(query, key, value, around)
    assert found.dtype == dtype
    # Both are rounded once: they are equal or neighbours.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def kept_for_the_backward(name: str, context: int) -> int:
    """Bytes of all storages a graph over the probe keeps, each counted once, the weights left out."""
    model, text = tiny_model(name), tiny_text(context + 40)[0]
    model.requires_grad_(False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.state_dict().values()}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with observing(model) as observer, torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        observer.read(text[:context], lambda *_: None, keep=True)
        logits = observer.read(text[context:], lambda *_: None, grad=True)
        assert logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_graph_keeps_nothing_of_the_context(name):
    assert kept_for_the_backward(name, 100) == kept_for_the_backward(name, 900) > 0


def test_the_context_is_stored_once():
    model, text = tiny_model(), tiny_text(140)[0]
    stored = []
    with observing(model) as observer:
        observer.read(text[:100], lambda layer, call, _output: stored.append((call.key, call.value)), keep=True)

        def watch(layer, call, _output):
            assert call.key.shape[2] == call.value.shape[2] == 40
            for kept, first in zip(observer.context(layer), stored[layer], strict=True):
                assert kept.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                assert kept.untyped_storage().nbytes() == 100 * 2 * 16 * 4

        observer.read(text[100:], watch, grad=True)
