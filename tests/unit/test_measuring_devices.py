"""Calibrating on one and on two pretended devices: nothing mixes, the numbers are the CPU's, and the host seldom waits."""

import numpy as np
import pytest
import torch

from kvprofile.calibration.calibrate import CANDIDATES, calibrate
from kvprofile.calibration.measuring import measure
from kvprofile.models.load import LoadedModel
from tests.pretend_cuda import on_cuda, over_two
from tests.unit.test_half_precision import MIX, loaded, samples

SYNCS_A_LAYER = 20
PLACES = pytest.mark.parametrize("place", [on_cuda, over_two], ids=["one device", "two devices"])


def moved(name: str, dtype: torch.dtype, place) -> LoadedModel:
    own = loaded(name, dtype)
    return LoadedModel(place(own.model), own.tokenizer, own.name, own.source, None)


@PLACES
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_measuring_gives_the_numbers_of_the_cpu(gpu, name, place):
    text = samples().calibration
    expected = measure(loaded(name, torch.float32), text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    found = measure(moved(name, torch.float32, place), text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=2e-3, atol=1e-6 * np.nanmax(np.abs(array)), err_msg=key)


@PLACES
def test_a_whole_calibration_in_half_precision(gpu, place):
    model = moved("Llama", torch.bfloat16, place)
    profile, _ = calibrate(model, samples(), budget=0.6, mix=MIX, warn=lambda _message: None)
    assert profile.calibration.device == "cuda"
    assert profile.check is not None
    assert profile.check.exact.achieved.mean == pytest.approx(0.6, abs=0.02)


def test_the_host_waits_at_most_twenty_times_a_layer_and_sample(gpu):
    totals = []
    for layers in (2, 4):
        own = loaded("Llama", torch.bfloat16, num_hidden_layers=layers)
        model = LoadedModel(on_cuda(own.model), own.tokenizer, own.name, own.source, None)
        gpu.forget()
        measure(model, samples().calibration, "gauss", candidates=CANDIDATES, mix=MIX)
        totals.append(gpu.syncs.total())
    assert totals[1] - totals[0] <= 2 * SYNCS_A_LAYER, gpu.syncs
    assert totals[0] <= 2 * SYNCS_A_LAYER, gpu.syncs
