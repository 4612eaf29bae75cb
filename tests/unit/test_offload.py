"""Weights that accelerate keeps on the CPU or on disk: calibrated, merged and evaluated as if they were in place."""

import accelerate
import numpy as np
import pytest
import torch

from kvprofile import KVMerger
from kvprofile.calibration.calibrate import CANDIDATES, calibrate
from kvprofile.calibration.measuring import measure
from kvprofile.digests import weights_digest
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.bench import run_fidelity
from kvprofile.evaluate.methods import Method
from kvprofile.evaluate.rows import Store
from kvprofile.generation import generate
from kvprofile.models.load import LoadedModel
from kvprofile.profile.storage import save_profile
from tests.unit.test_half_precision import MIX, loaded, samples
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

CPU = torch.device("cpu")


def to_cpu(model, _folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def partly(model, folder):
    """As `--device-map` does where the device is full: the second layer and the head are elsewhere."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    away = {"model.layers.1": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(model, {**places, **away}, main_device=CPU, offload_dir=folder)


OFFLOADED = pytest.mark.parametrize("offload", [to_cpu, to_disk, partly])


@OFFLOADED
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_measuring_gives_the_same_numbers(name, offload, tmp_path):
    text = samples().calibration
    expected = measure(loaded(name, torch.float32), text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    own = loaded(name, torch.float32)
    offload(own.model, tmp_path)
    found = measure(own, text, "gauss", candidates=CANDIDATES, mix=MIX).finish()
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@OFFLOADED
def test_the_weights_are_known_wherever_they_lie(offload, tmp_path):
    expected, other = weights_digest(tiny_model()), weights_digest(tiny_model(seed=1))
    for name, seed, known in (("same", 0, expected), ("other", 1, other)):
        model = tiny_model(seed=seed)
        offload(model, tmp_path / name)
        assert weights_digest(model) == known
    assert expected != other


@OFFLOADED
def test_the_whole_way(offload, tmp_path):
    stock, own = loaded("Llama", torch.bfloat16), loaded("Llama", torch.bfloat16)
    offload(own.model, tmp_path / "weights")
    profile, arrays = calibrate(own, samples(), budget=0.6, mix=MIX, warn=lambda _message: None)
    assert profile.calibration.device == "cpu"
    assert profile.check is not None
    save_profile(profile, arrays, tmp_path / "p.json")
    found = [
        generate(
            one.model, one.tokenizer, "Once upon a time" * 12, profile=tmp_path / "p.json", max_new_tokens=8, warn=print
        )
        for one in (stock, own)
    ]
    assert found[0] == found[1]
    plan = Method("own", 0.6, profile.model_dump(mode="json"))
    rows = [run_fidelity(one, samples().held_out, [plan], Store(None)) for one in (stock, own)]
    assert [row.values for row in rows[0]] == [row.values for row in rows[1]]


def test_a_padded_batch(tmp_path):
    tokens, mask = tiny_text(96, batch=2), torch.ones(2, 96, dtype=torch.long)
    mask[0, :8] = 0
    found = []
    for offload in (None, to_cpu):
        model = tiny_model().requires_grad_(False)
        if offload is not None:
            offload(model, tmp_path)
        merger = KVMerger.from_profile(uniform_values(model, share=0.6)).attach(model)
        found.append(
            model.generate(
                tokens, attention_mask=mask, past_key_values=merger.cache(), max_new_tokens=6, do_sample=False
            )
        )
        merger.detach()
    assert torch.equal(*found)


def test_a_model_without_weights_is_refused():
    own = loaded("Llama", torch.float32)
    empty = LoadedModel(own.model.to("meta"), own.tokenizer, own.name, own.source, None)
    with pytest.raises(KVProfileError, match="are on the meta device, so there are none; load the model"):
        KVMerger.from_profile(uniform_values(empty.model)).attach(empty.model)
    with pytest.raises(KVProfileError, match="are on the meta device"):
        calibrate(empty, samples(), mix=MIX)
