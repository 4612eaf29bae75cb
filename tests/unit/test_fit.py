"""`kvprofile fit`: its arithmetic against caches that were filled, and what it solves for against a search by trying all."""

import itertools
import json

import pytest
import torch
from transformers import DynamicCache

from kvprofile import KVMerger, load_profile
from kvprofile.errors import UsageError
from kvprofile.planning.fit import RECENT, Footprint, Kept, Target, even_spending, fit, footprint_of
from kvprofile.planning.sizes import NOTHING
from kvprofile.quantities import parse_count, parse_size
from kvprofile.runtime.cache import allocated_bytes
from tests.unit.architectures import build
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.tiny_models import VOCAB, head, profile_values, tiny_model
from tests.unit.window_reference import means_of

MODELS = {
    "Llama": tiny_model,
    "seven query heads a KV head": lambda: tiny_model(num_attention_heads=14, num_key_value_heads=2, hidden_size=224),
    "Gemma 3": lambda: build("Gemma 3", max_position_embeddings=2048),  # most layers have a window
    "Gemma 2": lambda: build("Gemma 2", max_position_embeddings=2048),
}


def filled(model, cache, tokens, batch):
    text = torch.randint(1, VOCAB, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece in (text[:, :-1], text[:, -1:]):
            model(piece, past_key_values=cache, logits_to_keep=1)
    return allocated_bytes(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_as_large_as_it_says(name, dtype):
    model = MODELS[name]().to(dtype)
    footprint = footprint_of(model.config, dtype)
    assert footprint.weights == sum(weight.nbytes for weight in model.parameters())
    shares = [0.25 + 0.5 * place / footprint.kv_heads for place in range(footprint.kv_heads)]
    heads = [head("streaming", epsilon=0.5, share=share) for share in shares]
    merger = KVMerger.from_profile(profile_values(model, heads)).attach(model)
    for tokens, batch in ((512, 1), (700, 2)):
        kept = Kept([([(share, NOTHING) for share in shares], RECENT)] * footprint.merged)
        said = footprint.kept_bytes(tokens, batch, kept)
        assert said == pytest.approx(filled(model, merger.cache(), tokens, batch), rel=0.02)
        said = footprint.stock_bytes(tokens, batch)
        assert said == pytest.approx(filled(model, DynamicCache(config=model.config), tokens, batch), rel=0.02)


FOOTPRINT = Footprint(10_000_000, 2, 3000, 4000, ("full_attention",) * 3 + ("sliding_attention",), 128, 2, 16, 4096)


@pytest.mark.parametrize("memory", [11_000_000, 11_300_000, 12_000_000, 14_000_000, 30_000_000])
def test_the_largest_of_everything_is_found(memory):
    target = Target(memory, context=2000, batch=2, reserve=500_000, piece=100)
    answer = fit(FOOTPRINT, target, [even_spending(FOOTPRINT, 2000)])
    (found,) = answer.found

    def fits(budget, context=2000, batch=2):
        rest = memory - 500_000 - FOOTPRINT.weights - FOOTPRINT.activations(min(100, context), batch)
        stock = FOOTPRINT.stock_bytes(context, batch)
        return rest >= (stock if budget == 1 else FOOTPRINT.kept_bytes(context, batch, FOOTPRINT.even(budget)))

    works = [step / 1000 for step in range(18, 1001) if fits(step / 1000)]
    assert found.amount == (max(works) if works else None)
    assert (found.cache <= answer.left) is bool(works)
    assert [room.amount for room in answer.rooms] == [1, 0.75, 0.5, 0.25]
    for room in answer.rooms:
        for name in ("context", "batch"):
            largest = getattr(room, name)
            assert not largest or fits(room.amount, **{name: largest})
            assert not fits(room.amount, **{name: largest + 1})


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen2.5-7b", "gemma2-2b", "phi3-mini"])
def test_aliases_need_no_network_and_no_weights(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("fit", name, "--memory", "24GB", "--context", "32k", "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["dtype"] == "bfloat16"
    (found,) = told["found"]
    assert found["predicted_kl"] is None
    assert 0 < found["amount"] <= 1
    assert told["weights"] + told["activations"] + told["reserve"] + found["cache"] <= told["memory"] == 24 * 10**9
    assert [room["amount"] for room in told["rooms"]] == [1, 0.75, 0.5, 0.25]


CONTEXT = ("--context", 512, "--batch", 2, "--dtype", "float32", "--reserve", "1kB")


def memory_for(folder, part):
    """A target in which a cache of such a part of the full one has room."""
    told = json.loads(run("fit", folder, "--memory", "1GB", *CONTEXT, "--json").stdout)
    assert [one["amount"] for one in told["found"]] == [1]
    return ("--memory", int(told["weights"] + told["activations"] + told["reserve"] + told["full"] * part), *CONTEXT)


def test_a_profile_predicts_what_its_plans_would(tiny_folder, tiny_profile, tmp_path):
    size = memory_for(tiny_folder, 0.5)
    result = run("fit", tiny_folder, *size, "--profile", tiny_profile, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [one["unit"] for one in told["found"]] == ["slots", "bytes"]
    slots, bits = told["found"]
    for number, (found, flag) in enumerate(((slots, "--budget"), (bits, "--bytes"))):
        assert 0.1 < found["amount"] < 1
        path = tmp_path / f"{number}.json"
        assert run("plan", tiny_profile, flag, found["amount"], "-o", path).exit_code == 0
        assert found["predicted_kl"] == pytest.approx(load_profile(path).plan.predicted_damage)
    # Bits and slots together do less harm in the same memory.
    assert bits["predicted_kl"] < slots["predicted_kl"]
    assert max(slots["cache"], bits["cache"]) <= told["left"]
    assert [(room["unit"], room["amount"]) for room in told["rooms"]][4:] == [
        ("bytes", amount) for amount in (0.5, 0.35, 0.25)
    ]
    assert all(room["predicted_kl"] is not None for room in told["rooms"])
    shown = run("fit", tiny_folder, *size, "--profile", tiny_profile).stdout
    for found, flag in ((slots, "--budget"), (bits, "--bytes")):
        assert f"({flag} {found['amount']:.3f}), a cache of" in shown
    assert f"kvprofile plan {tiny_profile} --bytes {bits['amount']:.3f} -o" in shown
    without = run("fit", tiny_folder, *size).stdout
    assert "No profile yet" in without
    assert "unknown" in without
    known = run("fit", "gemma3-270m", "--memory", "2GB", "--context", "32k", "--batch", "4").stdout
    assert "a profile of it comes with kvprofile; give --profile gemma3-270m" in known


def test_a_plan_for_a_memory_target_is_what_fit_found(tiny_folder, tiny_profile, tmp_path):
    size = memory_for(tiny_folder, 0.5)
    slots, bits = json.loads(run("fit", tiny_folder, *size, "--profile", tiny_profile, "--json").stdout)["found"]
    for number, (flags, found, unit) in enumerate((((), bits, "bytes"), (("--codec", "none"), slots, "slots"))):
        path = tmp_path / f"{number}.json"
        result = run("plan", tiny_profile, *size, *flags, "--model", tiny_folder, "-o", path)
        assert result.exit_code == 0, result.output
        plan = load_profile(path).plan
        assert (plan.unit, plan.asked) == (unit, found["amount"])
        assert f"{found['amount']:.1%} of the {unit} fit: a cache of" in result.stderr
    one = run("plan", tiny_profile, *size, "--codec", "int8", "--model", tiny_folder, "-o", tmp_path / "8.json")
    assert one.exit_code == 0, one.output
    assert load_profile(tmp_path / "8.json").plan.codec == "int8"


def test_a_memory_target_that_cannot_be_is_told(tiny_folder, tiny_profile, tmp_path):
    output = ("--model", tiny_folder, "-o", tmp_path / "p.json")
    refused(run("plan", tiny_profile, "--memory", "1GB", *output), 2, "is --memory and --context together")
    refused(run("plan", tiny_profile, *CONTEXT[:2], *output), 2, "is --memory and --context together")
    both = ("--memory", "1GB", "--context", "1k", "--budget", "0.5")
    refused(run("plan", tiny_profile, *both, *output), 2, "leave --budget and --bytes out")
    small = ("--memory", "1MB", "--context", "32k")
    refused(run("plan", tiny_profile, *small, *output), 3, "no budget fits")
    other = ("--memory", "24GB", "--context", "1k", "--model", "smollm2-135m", "-o", tmp_path / "p.json")
    refused(run("plan", tiny_profile, *other), 3, "does not fit this model")


# A policy whose slots have a bias, and that goes by attention: both are counted for every policy.
CODED = {
    "Llama": [
        head("gauss", epsilon=0.5, share=share, codecs=codecs)
        for share, codecs in ((0.3, ("int8", "int4")), (0.75, ("int4", "int4")))
    ],
    "Gemma 3": [
        head("gauss", epsilon=0.5, share=0.5, codecs=("int8", "int8")),
        head("gauss", epsilon=0.5, share=1.0, codecs=("int3", "turbo2")),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CODED)
def test_a_packed_cache_is_as_large_as_it_says(name, dtype):
    """Three lengths and two batches, windows packed as well."""
    changes = {"max_position_embeddings": 4096} | ({"sliding_window": 300} if name == "Gemma 3" else {})
    model = build(name, **changes).to(dtype)
    footprint, values = footprint_of(model.config, dtype), profile_values(model, CODED[name])
    pairs = [(one["key_codec"], one["value_codec"]) for one in CODED[name]]
    values["plan"]["windows"] = [
        {"layer": layer, "heads": [{"key_codec": keys, "value_codec": codec} for keys, codec in pairs]}
        for layer, kind in enumerate(values["model"]["attention"])
        if kind == "sliding_attention"
    ]
    heads = [(one["share"], pair) for one, pair in zip(CODED[name], pairs, strict=True)]
    kept = Kept([(heads, RECENT)] * footprint.merged, [pairs] * footprint.windowed)
    merger = KVMerger.from_profile(values, arrays={"key_mean": means_of(model)}).attach(model)
    for tokens, batch in itertools.product((512, 800, 1400), (1, 2)):
        found = filled(model, merger.cache(), tokens, batch)
        # The keys' means are there once, however many rows a batch has: of tiny models they are a part.
        assert footprint.kept_bytes(tokens, batch, kept) == pytest.approx(found, rel=0.02)
    merger.detach()


def test_what_cannot_be_is_refused(tiny_folder, tiny_profile, tmp_path):
    size = ("--memory", "24GB", "--context", "32k")
    refused(run("fit", "smolm2-135m", *size), 2, "unknown model 'smolm2-135m'")
    refused(run("fit", tiny_folder, "--memory", "many", "--context", "32k"), 2, "'many' is no size")
    refused(run("fit", tiny_folder, "--memory", "24GB", "--context", "long"), 2, "'long' is no number of tokens")
    refused(run("fit", "smollm2-135m", *size, "--profile", tiny_profile), 3, "was made for tiny")
    result = run("fit", tiny_folder, "--memory", "1MB", "--context", "32k")
    assert result.exit_code == 3
    assert "no budget fits" in result.stderr
    assert "No profile yet" not in result.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9),
        ("24 gb", 24e9),
        ("80G", 80e9),
        ("24GiB", 24 * 2**30),
        ("1.5 MiB", 1.5 * 2**20),
        ("1,000", 1000),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "count"), [("32k", 32768), ("128K", 131072), ("4,096", 4096), ("1.5k", 1536), ("1m", 2**20)]
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3", "24 XB", "0", "1e9", "nan", "0x10"])
def test_what_is_neither(text):
    for parse in (parse_size, parse_count):
        with pytest.raises(UsageError, match="; expected for example"):
            parse(text)
