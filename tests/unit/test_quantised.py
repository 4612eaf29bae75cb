"""Quantised weights: calibrated where gradients pass through them, refused in one line where they do not."""

import copy
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from kvprofile import load_profile
from kvprofile.calibration.calibrate import CANDIDATES, calibrate
from kvprofile.calibration.gradient_flow import check_gradients
from kvprofile.calibration.measuring import measure
from kvprofile.digests import weights_digest
from kvprofile.errors import KVProfileError
from kvprofile.models.load import LoadedModel, load_model
from tests.unit.architectures import SUPPORTED, build
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.test_half_precision import MIX, loaded, samples
from tests.unit.tiny_models import tiny_model, tiny_text

SIZE = ("--tokens", 256, "--samples", 2, "--held-out", 1, "--device", "cpu")
WAY_OUT = "--policy gauss --rule uniform"


class Int8Linear(nn.Module):
    """As other libraries have it: integers and scales in buffers, multiplied by a forward of its own."""

    def __init__(self, linear: nn.Linear, graded: bool) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.graded = graded

    def forward(self, hidden):
        with torch.set_grad_enabled(self.graded and torch.is_grad_enabled()):
            return hidden @ (self.qweight * self.scale).T.to(hidden.dtype)


class OneWay(torch.autograd.Function):
    """A kernel that has no backward."""

    @staticmethod
    def forward(_context, hidden):
        return hidden.clone()

    @staticmethod
    def backward(_context, _gradient):
        raise NotImplementedError("no backward")


class OneWayLinear(nn.Linear):
    def forward(self, hidden):
        return super().forward(OneWay.apply(hidden))


def weight_only(name="Llama", dtype=torch.float32, **changes) -> LoadedModel:
    own = loaded(name, dtype, **changes)
    quantize_(own.model, Int8WeightOnlyConfig())
    return own


def dequantised(own: LoadedModel) -> LoadedModel:
    """The same numbers as plain weights."""
    model = copy.deepcopy(own.model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    assert all(type(weight) is nn.Parameter for weight in model.parameters())
    return LoadedModel(model, own.tokenizer, own.name, own.source, None)


@pytest.mark.parametrize("name", SUPPORTED)
def test_gradients_pass_through_every_plain_model(name):
    check_gradients(build(name).requires_grad_(False))


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_weight_only_int8_measures_what_its_plain_weights_do(name):
    own, text = weight_only(name), samples().calibration
    found = measure(own, text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    expected = measure(dequantised(own), text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=2e-3, atol=1e-5 * np.nanmax(np.abs(array)), err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_calibration_of_weight_only_int8(dtype):
    profile, arrays = calibrate(weight_only(dtype=dtype), samples(), budget=0.6, mix=MIX, warn=lambda _message: None)
    assert profile.check is not None
    assert profile.check.exact.achieved.mean == pytest.approx(0.6, abs=0.02)
    assert all(np.isfinite(array).all() for key, array in arrays.items() if key != "attention_cosine")


def test_a_quantised_checkpoint_from_the_command_line(tiny_folder, tiny_text_file, tmp_path):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "quantised")
    for file in tiny_folder.glob("token*"):
        shutil.copy(file, tmp_path / "quantised")
    again = load_model(str(tmp_path / "quantised"), device="cpu").model
    assert hasattr(again.model.layers[0].mlp.down_proj.weight, "dequantize")

    result = run(
        "calibrate", tmp_path / "quantised", "--data", tiny_text_file, "-o", tmp_path / "p.json", *SIZE, "--budget", 0.6
    )
    assert result.exit_code == 0, result.output
    assert load_profile(tmp_path / "p.json").check is not None
    # It is a profile of the model that is not quantised as well.
    result = run("generate", tiny_folder, "--profile", tmp_path / "p.json", "--prompt", "Once upon a time")
    assert result.exit_code == 0, result.output


def test_quantised_activations_are_refused_and_the_way_out_works(tmp_path, monkeypatch, tiny_folder, tiny_text_file):
    def quantised(*args, **kwargs):
        own = load_model(*args, **kwargs)
        quantize_(own.model, Int8DynamicActivationInt8WeightConfig())
        return own

    monkeypatch.setattr("kvprofile.models.load.load_model", quantised)
    command = ("calibrate", tiny_folder, "--data", tiny_text_file, "-o", tmp_path / "p.json", *SIZE, "--budget", 0.6)
    refused(
        run(*command), 1, "no gradient passes through model.layers.0.self_attn.o_proj (Linear of Int8Tensor)", WAY_OUT
    )
    assert not list(tmp_path.iterdir())
    result = run(*command, *WAY_OUT.split())
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
def test_one_module_that_stops_gradients_is_named(place):
    parent, _, last = place.rpartition(".")
    own = loaded("Llama", torch.float32)
    layer = own.model.model.layers[1].get_submodule(parent)
    linear = getattr(layer, last)

    setattr(layer, last, Int8Linear(linear, graded=True))
    profile, _ = calibrate(own, samples(), budget=0.6, mix=MIX, warn=lambda _message: None)
    assert profile.check is not None

    one_way = OneWayLinear(linear.in_features, linear.out_features, bias=False).requires_grad_(False)
    for blocking in (Int8Linear(linear, graded=False), one_way):
        setattr(layer, last, blocking)
        with pytest.raises(KVProfileError) as caught:
            calibrate(own, samples(), budget=0.6, mix=MIX)
        told = str(caught.value)
        assert told.startswith(f"no gradient passes through model.layers.1.{place} ({type(blocking).__name__}), and")


def test_a_module_whose_weights_are_zero_is_not_refused():
    model = tiny_model().requires_grad_(False)
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    check_gradients(model)


def test_other_quantised_weights_have_another_digest():
    models = [tiny_model(seed=seed) for seed in (0, 0, 1)]
    for model in models:
        quantize_(model, Int8WeightOnlyConfig())
    first, same, other = (weights_digest(model) for model in models)
    assert first == same
    assert first not in (other, weights_digest(tiny_model()))
    assert models[0](tiny_text(8)).logits.isfinite().all()
