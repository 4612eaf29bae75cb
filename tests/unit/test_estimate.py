"""The estimate of a calibration: what is counted is what a model has and does, and where accelerate would put it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from kvprofile.calibration.cost import Sizes, Work, checking, measuring, memory, prefill
from kvprofile.calibration.estimate import LIBRARIES, Rates, estimate, measure_rates
from kvprofile.calibration.measure.damage import BUDGETS, MANY
from kvprofile.calibration.measure.probed import EVERY
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.errors import UsageError
from kvprofile.merging.nearest import WINDOW
from kvprofile.models.configurations import bundled_configuration
from tests.unit.conftest import run
from tests.unit.tiny_models import MODELS, tiny_model

RATES = Rates(products=1e9, exact=1e9, element=1e-9, launch=1e-6)
SIZES = Sizes(
    layers=3,
    merged=2,
    heads=4,
    kv_heads=2,
    dim=16,
    hidden=64,
    intermediate=96,
    vocabulary=640,
    body=100_000,
    parameters=180_000,
    item=4,
)


def told(config, **changes):
    usual = {"samples": 4, "held_out": 2, "tokens": 512, "candidates": ("h2o",), "rates": RATES, "device": "cpu"}
    return estimate(config, **{**usual, **changes})


@pytest.fixture(scope="module")
def config(tiny_folder):
    return AutoConfig.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def llama2():
    return AutoConfig.for_model(**bundled_configuration("llama2-7b"))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_weights_and_cache_are_those_of_the_model(name):
    model = tiny_model(name)
    found = told(model.config, dtype="float32")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.memory["weights"] == sum(weight.numel() * weight.element_size() for weight in model.parameters())
    # Two layers, two KV heads of sixteen dimensions, keys and values, 512 tokens.
    assert found.memory["cache"] == 2 * 2 * 16 * 2 * 512 * 4
    assert told(model.config, dtype="bfloat16").memory["weights"] * 2 == found.memory["weights"]


@pytest.mark.parametrize("tokens", [64, 200])
def test_a_prefill_has_the_multiply_adds_that_torch_counts(tokens):
    model = tiny_model("llama", attention="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model(torch.arange(tokens)[None])
    sizes = Sizes(2, 2, 4, 2, 16, 64, 96, 640, sum(p.numel() for p in model.model.layers.parameters()), 0, 4)
    norms = sum(weight.numel() for weight in model.parameters() if weight.ndim == 1) - 64
    # Eager attention multiplies what is masked as well; half of it is done by the functions that are used.
    hidden = tokens**2 * sizes.heads * sizes.dim * sizes.layers
    # What torch counts: two operations a multiply-add, and none of the norms or of the rotation's angles.
    rotation = counter.get_total_flops() / 2 - (prefill(sizes, tokens).products + hidden - tokens * norms)
    assert 0 <= rotation <= tokens * sizes.dim


def test_work_adds_up_and_takes_its_time_by_the_rates():
    work = Work(products=2e9, exact=1e9, elements=3e9, launches=1e6) + Work(products=1e9)
    assert RATES.seconds(work) == pytest.approx(3 + 1 + 3 + 1)
    assert RATES.seconds(work.times(2)) == pytest.approx(16)


def test_the_estimate_grows_with_the_work(config):
    usual = told(config)
    assert told(config, samples=8).measure_seconds == pytest.approx(2 * usual.measure_seconds)
    assert told(config, held_out=4).check_seconds == pytest.approx(2 * usual.check_seconds)
    assert told(config, held_out=0).check_seconds == 0
    assert usual.seconds == usual.measure_seconds + usual.check_seconds
    assert usual.measure_seconds == pytest.approx(4 * sum(usual.stages["measure"].values()))
    assert told(config, candidates=()).measure_seconds < usual.measure_seconds
    assert told(config, mix=ProbeMix(passages=32)).measure_seconds > usual.measure_seconds


def test_every_policy_is_counted_by_what_it_does():
    names = ("h2o", "gauss", "gather", "gather-mended", "gather-matched", "again-matched")
    terms = measuring(SIZES, 1024, 100, names)
    drop, merge, join, mend, match, again = (terms[f"damage of {name}"] for name in names)
    # A merging policy attends to the slots of every budget anew, keys and values; a dropping one adds up values once.
    asked = sum(share if share <= MANY else share / EVERY for share in BUDGETS)
    assert merge.exact == pytest.approx(2 * asked * drop.exact)
    assert merge.exact < join.exact == mend.exact < match.exact == again.exact
    assert merge.launches < mend.launches
    assert {"prefill", "statistics", "probe", "gradients", "damage"} < set(terms)
    assert set(measuring(SIZES, 1024, 100, ())) == {"prefill", "statistics"}
    one, two = (
        measuring(SIZES, 1024, 100, names, codecs)["damage of codecs"] for codecs in (["int8"], ["int8", "int4"])
    )
    assert one.exact < two.exact < 2 * one.exact < sum(terms[f"damage of {name}"].exact for name in names)
    assert set(checking(SIZES, 1024)) == {"prefill", "answers", "merging"}


def test_the_most_similar_survivor_costs_no_square_of_a_long_prompt():
    def cosines(tokens):
        with_them, without = (measuring(SIZES, tokens, 100, (name,)) for name in ("gather", "gauss"))
        return with_them["damage of gather"].exact - without["damage of gauss"].exact

    assert cosines(2 * WINDOW // 16) == pytest.approx(4 * cosines(WINDOW // 16))
    assert cosines(64 * WINDOW) < 2.1 * cosines(32 * WINDOW)


def test_memory_is_what_is_alive_at_once():
    def held(**changes):
        values = {"tokens": 1024, "probe": 100, "candidates": ("h2o",), "check": True, **changes}
        return memory(SIZES, values["tokens"], values["probe"], values["candidates"], check=values["check"])

    assert held()["working"] >= held(check=False)["working"] >= held(check=False, candidates=())["working"]
    assert held(probe=10_000)["working"] > held()["working"]
    assert held(tokens=2048)["cache"] == 2 * held()["cache"]


def test_with_a_device_map_every_weight_lies_somewhere_and_layers_bring_their_cache(llama2):
    room = {0: "12GiB", 1: "12GiB", "cpu": "20GiB"}
    found = told(llama2, device="auto", dtype="float16", device_map="sequential", max_memory=room)
    held = found.memory
    assert set(found.devices) == {"cuda:0", "cuda:1"}
    working = len(found.devices) * held["working"]
    assert sum(found.devices.values()) == pytest.approx(held["weights"] + held["cache"] + working, rel=1e-3)
    assert found.devices["cuda:0"] - held["working"] <= 12 * 2**30
    balanced = told(llama2, device="auto", dtype="float16", device_map="balanced", max_memory=room).devices
    assert abs(balanced["cuda:0"] - balanced["cuda:1"]) < 0.25 * held["weights"]
    small = told(llama2, device="auto", dtype="float16", device_map="auto", max_memory={0: "6GiB", "cpu": "20GiB"})
    assert set(small.devices) == {"cuda:0", "cpu"}


def test_without_a_gpu_a_device_map_is_counted_for_the_cpu_and_said(llama2, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = told(llama2, device="auto", dtype="float16", device_map="auto")
    assert found.devices == {"cpu": sum(found.memory.values()) - found.memory["statistics"] - LIBRARIES}
    assert found.note == "no CUDA device is here, so the whole model is counted for the CPU"
    with pytest.raises(UsageError, match="unknown device map 'everywhere'"):
        told(llama2, device="auto", device_map="everywhere")


def test_rates_are_measured_in_the_dtype_of_the_weights():
    rates = measure_rates(torch.device("cpu"), torch.bfloat16)
    assert min(rates.products, rates.exact, rates.element, rates.launch) > 0
    alike = measure_rates(torch.device("cpu"), torch.float32)
    assert alike.products == alike.exact


def test_a_dry_run_with_a_device_map(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    result = run("calibrate", tiny_folder, "--dry-run", "--device-map", "auto")
    assert result.exit_code == 0, result.output
    assert "no CUDA device is here" in result.stdout
    values = json.loads(run("calibrate", tiny_folder, "--dry-run", "--device-map", "auto", "--json").stdout)
    assert set(values["devices"]) == {"cpu"}
