"""The whole way in half precision: calibrate, generate, padded batch and evaluate, on several kinds of attention."""

import numpy as np
import pytest
import torch

from kvprofile import KVMerger
from kvprofile.calibration.calibrate import CANDIDATES, calibrate
from kvprofile.calibration.measuring import measure
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.evaluate.bench import run_fidelity
from kvprofile.evaluate.methods import Method
from kvprofile.evaluate.rows import Store
from kvprofile.models.load import LoadedModel
from kvprofile.samples import Sample, SampleSet
from tests.unit.architectures import build
from tests.unit.conftest import tiny_tokenizer
from tests.unit.tiny_models import tiny_text

# Among them seven query heads a KV head; a soft cap and sliding layers; norms of queries and keys; sinks.
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"hidden_size": 112, "num_attention_heads": 14},
    "Gemma 2": {},
    "Gemma 3": {},
    "GPT-OSS": {},
}
CONTEXT, FOLLOWING = 128, 40
MIX = ProbeMix(passages=4, passage_tokens=12, continuation_tokens=16)
# Relative rounding of the dtype; damage is a square, through two layers and a gradient.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
BOTH = pytest.mark.parametrize("dtype", ROUNDING, ids=["bfloat16", "float16"])
EVERY = pytest.mark.parametrize("name", ARCHITECTURES)


def loaded(name: str, dtype: torch.dtype, **changes: int) -> LoadedModel:
    model = build(name, **ARCHITECTURES[name], **changes).requires_grad_(False).to(dtype)
    return LoadedModel(model, tiny_tokenizer(), name, "made in memory", None)


def samples() -> SampleSet:
    texts = [tiny_text(CONTEXT + FOLLOWING, vocabulary=90, seed=seed)[0] for seed in (0, 1)]
    one, other = (Sample(text[:CONTEXT], text[CONTEXT:], "noise", "noise") for text in texts)
    return SampleSet([one], [other], "noise", "0" * 64)


@BOTH
@EVERY
def test_everything_runs(name, dtype):
    model, text = loaded(name, dtype), samples()
    profile, arrays = calibrate(model, text, budget=0.6, mix=MIX, warn=lambda _message: None)
    assert profile.calibration.dtype == str(dtype).removeprefix("torch.")
    assert profile.check is not None
    assert profile.check.exact.achieved.mean == pytest.approx(0.6, abs=0.02)
    assert np.isfinite(profile.check.exact.fidelity.recall_kl)
    assert all(np.isfinite(array).all() for key, array in arrays.items() if key != "attention_cosine")

    plan = Method("own", 0.6, profile.model_dump(mode="json"))
    rows = run_fidelity(model, text.held_out, [plan], Store(None))
    assert all(np.isfinite(list(row.values.values())).all() for row in rows)

    merger = KVMerger.from_profile(profile).attach(model.model)
    prompts, padding = tiny_text(110, vocabulary=90, batch=2), 30
    mask = torch.ones_like(prompts)
    mask[0, :padding] = 0
    out = model.model.generate(
        prompts, attention_mask=mask, past_key_values=merger.cache(), max_new_tokens=34, do_sample=False
    )
    assert out.shape == (2, 144)
    merger.detach()

    # The same weights in single precision say the same, to the dtype's rounding and a drawn answer that falls differently.
    single = LoadedModel(model.model.float(), model.tokenizer, name, model.source, None)
    expected = measure(single, text.calibration, "gauss", candidates=CANDIDATES, mix=MIX).finish()["damage_mean"]
    found = arrays["damage_mean"]
    assert found.sum() == pytest.approx(expected.sum(), rel=0.02 + 30 * ROUNDING[dtype])
    assert np.abs(found - expected).sum() < (0.04 + 50 * ROUNDING[dtype]) * expected.sum()
