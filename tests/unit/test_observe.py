"""What is observed is what a stock cache stores and what eager attention computes."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, DynamicCache, FalconConfig, GPTJConfig, Lfm2Config, PreTrainedModel

from kvprofile import KVMerger
from kvprofile.calibration.observe import observing
from kvprofile.errors import KVProfileError
from kvprofile.runtime.attention import AttentionCall
from tests.unit.merge_reference import read
from tests.unit.tiny_models import MODELS, VOCAB, random_model, tiny_model, tiny_text, uniform_values

ALL = [(name, attention) for name in MODELS for attention in ("sdpa", "eager")] + [("gemma2", "eager")]


def ignore(_layer: int, _call: AttentionCall, _output: Tensor) -> None:
    """Watch nothing."""


@torch.no_grad()
def probabilities(call: AttentionCall, keys: Tensor, window: int | None) -> Tensor:
    """Attention probabilities `(batch, heads, queries, tokens)` in float64, from what was observed."""
    group = call.query.shape[1] // keys.shape[1]
    logits = (
        call.query.double() @ keys.double().repeat_interleave(group, dim=1).transpose(-1, -2) * call.softmax.scaling
    )
    if call.softmax.softcap is not None:
        logits = call.softmax.softcap * torch.tanh(logits / call.softmax.softcap)
    tokens = torch.arange(keys.shape[2])
    distance = tokens[-call.query.shape[2] :, None] - tokens[None, :]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)


def window_of(model: PreTrainedModel, layer: int) -> int | None:
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * (layer + 1)
    return model.config.sliding_window if kinds[layer] == "sliding_attention" else None


@pytest.mark.parametrize(("name", "attention"), ALL)
@torch.no_grad()
def test_keys_and_values_are_those_a_stock_cache_stores(name, attention):
    model, text = tiny_model(name, attention=attention), tiny_text(60)
    stock = DynamicCache()  # without a configuration it stores every token of sliding layers too
    expected = model(text, past_key_values=stock, logits_to_keep=1).logits
    seen = []

    def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
        seen.append(layer)
        assert call.module is model.model.layers[layer].self_attn
        assert torch.equal(call.key, stock.layers[layer].keys)
        assert torch.equal(call.value, stock.layers[layer].values)
        assert call.query.shape == (1, 4, 60, 16)
        assert output.shape == (1, 60, 4, 16)

    with observing(model) as observer:
        assert torch.equal(observer.read(text[0], watch), expected[0])
    assert seen == [0, 1]


@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize(("name", "attention"), ALL)
@torch.no_grad()
def test_queries_reproduce_the_attention_of_the_model(name, attention, kept):
    text = tiny_text(60)
    expected = tiny_model(name, attention="eager")(text, output_attentions=True).attentions
    model = tiny_model(name, attention=attention)
    compared = []

    def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
        old = observer.context(layer) or (call.key[:, :, :0], call.value[:, :, :0])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, (call.key, call.value), strict=True))
        found = probabilities(call, keys, window_of(model, layer))
        assert torch.allclose(found.float(), expected[layer][:, :, kept:], atol=1e-5)
        assert found[..., -1, :].amax() > 3 / 60  # not flat
        spread = values.double().repeat_interleave(2, dim=1)
        assert torch.allclose(output.double(), (found @ spread).transpose(1, 2), atol=1e-5)
        compared.append(layer)

    with observing(model) as observer:
        if kept:
            observer.read(text[0, :kept], ignore, keep=True)
        observer.read(text[0, kept:], watch)
    assert compared == [0, 1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_reads_follow_what_was_kept(name):
    model, text = tiny_model(name), tiny_text(90)
    stock = DynamicCache()
    expected = model(text, past_key_values=stock).logits[0]
    with observing(model) as observer:
        first = observer.read(text[0, :30], ignore, keep=True)
        second = observer.read(text[0, 30:60], ignore, keep=True)
        keys: list[Tensor] = []

        def watch(layer: int, call: AttentionCall, _output: Tensor) -> None:
            keys.append(torch.cat([observer.context(layer)[0], call.key], dim=2))

        third = observer.read(text[0, 60:], watch)
    assert torch.allclose(torch.cat([first, second, third]), expected[[29, 59, 89]], atol=1e-5)
    for key, layer in zip(keys, stock.layers, strict=True):
        assert torch.allclose(key, layer.keys, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("grad", [False, True])
@torch.no_grad()
def test_a_read_that_is_not_kept_lets_everything_go(name, grad):
    model, text = tiny_model(name), tiny_text(90)
    expected = model(text[:, 60:]).logits[0]
    with observing(model) as observer:
        observer.read(text[0, :30], ignore, keep=True)
        observer.read(text[0, 30:60], ignore, grad=grad)
        lengths: list[int] = []
        again = observer.read(text[0, 60:], lambda _layer, call, _output: lengths.append(call.key.shape[2]))
    assert torch.allclose(again, expected[[-1]], atol=1e-5)
    assert lengths == [30, 30]


def test_gradients_reach_the_attention_outputs():
    model, text = tiny_model(), tiny_text(60)
    weights = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1))

    # Independently: the same from hooks on the projection after the attention, in one forward.
    inputs: list[Tensor] = []

    def remember(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(remember) for layer in model.model.layers]
    (model(text).logits[0, 40:] * weights).sum().backward()
    expected = [one.grad[0, 40:].view(20, 4, 16) for one in inputs]
    for hook in hooks:
        hook.remove()

    for trainable in (True, False):
        model.requires_grad_(trainable)
        outputs: list[Tensor] = []
        with observing(model) as observer:
            observer.read(text[0, :40], ignore, keep=True)
            logits = observer.read(
                text[0, 40:], lambda _layer, _call, output, kept=outputs: kept.append(output), grad=True
            )
        assert logits.shape == (20, VOCAB)
        found = torch.autograd.grad((logits * weights).sum(), outputs)
        for one, gradient in zip(found, expected, strict=True):
            assert torch.allclose(one[0], gradient, atol=1e-4)


def tensors_alive() -> set[int]:
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)}


def test_nothing_is_kept_unasked():
    model, text = tiny_model(), tiny_text(60)
    with observing(model) as observer:
        observer.read(text[0], ignore)
    before = tensors_alive()
    held: list[weakref.ref[Tensor]] = []

    def watch(_layer: int, call: AttentionCall, output: Tensor) -> None:
        assert not call.query.requires_grad
        # Once the next layer is at work, the one before has been let go.
        assert [reference() for reference in held] == [None] * len(held)
        held.extend(weakref.ref(part) for part in (call.query, call.key, call.value, output))

    with observing(model) as observer:
        observer.read(text[0], watch)
        assert [reference() for reference in held] == [None] * 8
        assert len(tensors_alive() - before) == 0
        observer.read(text[0], ignore, keep=True)
        assert len(tensors_alive() - before) >= 4
    del observer
    assert tensors_alive() <= before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_model_is_restored(attention):
    model, text = tiny_model(attention=attention), tiny_text(60)
    expected = model(text).logits

    def refuse(_layer: int, _call: AttentionCall, _output: Tensor) -> None:
        raise ZeroDivisionError

    with observing(model) as observer:
        observer.read(text[0], ignore)
    assert model.config._attn_implementation == attention
    for failing, watch, error in ((text[0], refuse, ZeroDivisionError), (text[0] + VOCAB, ignore, IndexError)):
        with pytest.raises(error), observing(model) as observer:
            observer.read(failing, watch)
        assert model.config._attn_implementation == attention
    assert torch.equal(model(text).logits, expected)


@torch.no_grad()
def test_an_attached_model_can_be_observed_and_stays_attached():
    model, text = tiny_model(), tiny_text(140)
    keys: list[Tensor] = []
    with observing(model) as observer:
        observer.read(text[0], lambda _layer, call, _output: keys.append(call.key.clone()))
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    expected = read(model, merger.cache(), text, [120])
    cache = merger.cache()
    first = model(text[:, :120], past_key_values=cache).logits
    again: list[Tensor] = []
    with observing(model) as observer:
        observer.read(text[0], lambda _layer, call, _output: again.append(call.key.clone()))
    assert all(map(torch.equal, again, keys))
    rest = read(model, cache, text[:, 120:], [1])
    assert torch.equal(torch.cat([first, rest], dim=1), expected)
    merger.detach()
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_hybrid_model_is_observed_where_it_has_attention():
    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"] * 2,
    )
    model, text = random_model(config), tiny_text(40)
    stock = DynamicCache(config=config)
    model(text, past_key_values=stock)
    with observing(model) as observer:
        # The second time too: what was not kept leaves nothing behind.
        for _ in range(2):
            seen: dict[int, Tensor] = {}
            observer.read(text[0], lambda layer, call, _output, seen=seen: seen.update({layer: call.key.clone()}))
            assert list(seen) == [1, 3]
            assert all(torch.equal(key, stock.layers[layer].keys) for layer, key in seen.items())


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
        FalconConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False),
        GPTJConfig(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=512, eos_token_id=1),
    ],
    ids=["bloom", "falcon", "gptj"],
)
@torch.no_grad()
def test_a_model_that_bypasses_the_attention_interface(config):
    model, text = random_model(config, attention="eager"), tiny_text(40)
    expected = model(text).logits
    with (
        pytest.raises(KVProfileError, match="does not use transformers' attention interface"),
        observing(model) as observer,
    ):
        observer.read(text[0], ignore)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(text).logits, expected)


def test_an_attention_implementation_without_a_counterpart():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    told = "'flash_attention_2'; load it with attn_implementation='sdpa' or 'eager'"
    with pytest.raises(KVProfileError, match=told), observing(model):
        pass
    assert model.config._attn_implementation == "flash_attention_2"
