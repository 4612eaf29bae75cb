"""Every architecture either works, in all the ways its caches are used, or is refused when it is attached.

The table in docs/architectures.md is made here: run `python -m tests.unit.test_architectures` after a change.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprofile import KVMerger
from kvprofile.calibration.measure.probed import Probed, Reading
from kvprofile.calibration.observe import _WatchedLayer, observing
from kvprofile.calibration.probe_mix import KINDS
from kvprofile.calibration.probes import Probe
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.errors import KVProfileError
from kvprofile.profile.fingerprint import model_facts
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.install import install, restore
from kvprofile.runtime.settings import CHUNK, LONGEST_CHUNK
from tests.unit.architectures import REFUSED, SUPPORTED, build
from tests.unit.merge_reference import read, relative_error
from tests.unit.test_runtime_merged import check_against_reference
from tests.unit.test_runtime_padding import rows_equal_rows_alone
from tests.unit.tiny_models import head, profile_values, tiny_text, uniform_values

PATH = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
MERGED = [name for name in SUPPORTED if name != "Mistral, sliding"]

model_of = cache(build)


def planned(model: PreTrainedModel) -> dict:
    """A plan in which the KV heads differ in policy, threshold and share."""
    shares = [0.553, 0.718, 0.64, 0.83]
    heads = [
        head(("absorb", "gauss")[index % 2], epsilon=None, share=shares[index])
        for index in range(model_facts(model.config)["kv_heads"])
    ]
    return profile_values(model, heads)


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_nothing_merged_is_the_stock_cache_bit_for_bit(name):
    model, text, cuts = model_of(name), tiny_text(80, batch=2), [45, 46, 74]
    expected = read(model, DynamicCache(config=model.config), text, cuts)
    merger = KVMerger.from_profile(uniform_values(model)).attach(model)
    try:
        assert torch.equal(read(model, merger.cache(), text, cuts), expected)
    finally:
        merger.detach()


@pytest.mark.parametrize("name", MERGED)
def test_merged_equals_the_float64_reference(name):
    model = model_of(name)
    # Merged after the first piece, read by the second, and merged again while decoding.
    check_against_reference(model, planned(model), tiny_text(118), [80, 96])


@pytest.mark.parametrize("name", MERGED)
def test_a_padded_batch_gives_each_row_what_it_gets_alone(name):
    model = model_of(name)
    merger = KVMerger.from_profile(planned(model)).attach(model)
    try:
        rows_equal_rows_alone(model, merger, (90, 67), decoded=14)
    finally:
        merger.detach()


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_keys_are_observed_as_a_stock_cache_stores_them(name):
    model, text = model_of(name), tiny_text(40)
    stock = DynamicCache()  # without a configuration it stores every token of sliding layers too
    expected = model(text, past_key_values=stock).logits[0, -1:]
    stored = [layer.keys for layer in stock.layers if layer.is_initialized]
    seen: dict[int, Tensor] = {}

    def watch(layer: int, call: AttentionCall, _output: Tensor) -> None:
        seen[layer] = call.key

    with observing(model) as observer:
        assert torch.allclose(observer.read(text[0], watch), expected, atol=1e-5)
    assert len(seen) == len(stored)
    assert all(map(torch.equal, [seen[layer] for layer in sorted(seen)], stored))


@pytest.mark.parametrize("name", MERGED)
def test_a_calibration_sees_the_attention_of_the_model(monkeypatch, name):
    model, text = model_of(name), tiny_text(60)[0]
    layers = [index for index, kind in enumerate(model_facts(model.config)["attention"]) if kind == "full_attention"]
    contexts, errors = [], []
    outputs: dict[int, Tensor] = {}
    attended = _WatchedLayer.attended

    def remember(layer: _WatchedLayer, call: AttentionCall, output: Tensor, mass: None) -> None:
        if layer.unread:
            outputs[layer.index] = output.detach()[0]
        attended(layer, call, output, mass)

    def on_probe(layer: int, reading: Reading) -> None:
        probed = Probed(reading, [KINDS.index("continuation")])
        wanted = outputs[layer].transpose(0, 1).reshape(probed.exact.shape)
        errors.append(relative_error(probed.exact, wanted))

    monkeypatch.setattr(_WatchedLayer, "attended", remember)
    with observing(model) as observer:
        probe = Probe(text[:40], text[40:], torch.full((20,), KINDS.index("continuation")))
        read_probe(observer, probe, lambda layer, _call, _mass: contexts.append(layer), on_probe, layers=layers, seed=0)
        observer.read(probe.context, lambda *_: None, keep=True)
        logits = observer.read(probe.tokens, lambda *_: None, grad=True)
    assert relative_error(logits.detach(), model(text[None]).logits[0, 40:].detach()) < 1e-5
    assert contexts == sorted(set(contexts))
    assert len(errors) == len(layers)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_when_it_is_attached(name):
    model = model_of(name)
    own = model.config._attn_implementation
    merger = KVMerger.from_profile(uniform_values(model, share=0.5))
    with pytest.raises(KVProfileError, match=r"(does not|cannot|supports)") as caught:
        merger.attach(model)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == own
    assert type(model).__name__ in str(caught.value)
    with pytest.raises(KVProfileError), observing(model):
        pass


def test_the_page_is_current():
    assert PATH.read_text(encoding="utf-8") == page()


_KINDS = {
    "sliding_attention": "sliding layers",
    "chunked_attention": "chunked layers",
    "shared_attention": "layers without keys of their own",
}


def row(name: str) -> str:
    """One line of the table."""
    model = model_of(name)
    label = f"| {name} | `{type(model).__name__}` |"
    try:
        readers = install(model)
    except KVProfileError as error:
        return f"{label} nothing | refused: {error} |"
    restore(model)
    kinds = model_facts(model.config)["attention"]
    others = sorted({_KINDS[kind] for kind in kinds if kind in _KINDS and kind != "shared_attention"})
    notes = []
    if others:
        packed = ", packed where bytes are planned" if "full_attention" in kinds else " as it is"
        notes.append(f"{' and '.join(others)} keep their window{packed}")
    if any(len(modules) > 1 for modules in readers.values()):
        notes.append("layers that read another layer's keys read its merged slots; it is merged after its last reader")
    if any(hasattr(module, "sinks") for modules in readers.values() for module in modules):
        notes.append("attention sinks stay in the softmax")
    if getattr(model.config, "attn_logit_softcapping", None):
        notes.append("logits are capped before a slot's count is added")
    full = kinds.count("full_attention")
    merged = "every layer" if full == len(kinds) else "full-attention layers" if full else "nothing"
    return f"{label} {merged} | {'; '.join(notes)} |"


def page() -> str:
    """The whole of docs/architectures.md."""
    table = "\n".join(map(row, (*SUPPORTED, *REFUSED)))
    return _TEXT.format(table=table, chunk=CHUNK, longest=LONGEST_CHUNK)


_TEXT = """# What the runtime works with

The table is made by `tests/unit/test_architectures.py` from tiny models built from configurations with transformers
5.23 (`python -m tests.unit.test_architectures` writes this page). For every architecture that is not refused the
tests show that a cache in which nothing is merged gives the stock cache's logits bit for bit, that merged logits
equal those of a float64 reference written with plain loops, in prefill, in pieces and while decoding, and that each
row of a padded batch gets what it gets alone.

| Architecture | Class | Merged | Notes |
|---|---|---|---|
{table}

A model is accepted or refused by what it does, not by its name. `KVMerger.attach` runs eight tokens through it and
looks, in every full-attention layer, who attends to the keys and values that were stored, and whether our attention
over them gives what the model's own gave. So a model that is not in the table is either followed or refused, in one
sentence, before it generates anything. Both `attn_implementation="sdpa"` and `"eager"` work.

## Ways to generate

| Way | With a merged cache |
|---|---|
| greedy, sampling, several sequences, beam search | yes |
| batches, prompts of different lengths | yes, padded on the left (`padding_side="left"`) with the `attention_mask` |
| chunked prefill (`prefill_chunk_size`) | yes |
| several turns on one cache | yes: pass the whole conversation and the same cache |
| pipelines, streamers, LoRA, lm-evaluation-harness | yes, inside `merger.generating()`: see [use-it-in.md](use-it-in.md) |
| prompt lookup, assisted decoding | yes: rejected tokens leave no trace; below a budget of 1 see under the table |
| padding on the right or in the middle, 4D masks | refused, except where nothing is merged |
| `cache_implementation=` static, offloaded or quantized | refused by transformers beside a merged cache: pass one of the two |
| a compiled model (`model.compile()`, a compiled `forward`) | refused: generate with the model itself |
| continuous batching (`generate_batch`) | refused by transformers while a merger is attached: `merger.detach()` first |
| offloading the cache, pickling it | refused; `copy.deepcopy` works |
| `use_cache=False`, `output_attentions=True` beside the cache | refused |
| training, or gradients through the cache | refused: `model.eval()` and `torch.no_grad()` |

With drafted tokens a forward is merged once it is known which of its tokens stay. What is merged together then depends
on how many tokens each forward kept: the text is that of the same tokens read in the same pieces, which a test shows,
and below a budget of 1 it may differ from plain decoding's.

## What is stored, at every step

After `seen` tokens a head whose share is `s` stores at most `s * seen` slots, or as many as there are protected tokens
(by default the first 4 and the newest 32) where those are more, plus the slack: {chunk} tokens that wait in the tail to
be merged together (up to {longest} where a share is below 1/{chunk}), and 2 for rounding. Every test that merges checks
this after every forward, for every row and head (`tests/unit/budgets.py`). It holds in exact mode under every policy,
while a prompt is read in pieces and while the text grows; [policies.md](policies.md#how-the-number-of-slots-is-met)
says how. In threshold mode slots emerge from the thresholds. Until {chunk} tokens are older than the newest protected
ones nothing is merged: with the default protection prompts below 64 tokens are left alone.

`cache.slots()` counts slots of each row's own tokens. `cache.nbytes()` counts all that is allocated, so in a padded
batch also the columns of the tail that the shorter rows leave unused. With assisted decoding a prompt is merged when
its first forward has been checked, so that its full keys and values are alive until then.

Start every new text with a new `merger.cache()`. A cache that is used again by mistake is refused where the number of
rows, the padding or the length does not fit what it has seen, and by `generate` also where the ids passed do not begin
with those it was given before. A forward of your own (`model(ids, past_key_values=cache)`) shows the new tokens only, and
what could be the next piece is taken for it, as by every transformers cache.
"""

if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    print(f"Wrote {PATH}")
