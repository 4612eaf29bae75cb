"""Which layers keep 16 bits in vLLM: as few as leave little harm, the worst first."""

import json

import numpy as np
import pytest

from kvprofile import load_arrays, load_profile, save_profile
from kvprofile.profile.export import LEFT
from tests.unit.conftest import run


def exported(tmp_path, profile):
    out = tmp_path / "engine.json"
    result = run("export", profile, "--to", "vllm", "-o", out, "--force")
    return result, json.loads(out.read_text()) if result.exit_code == 0 else None


@pytest.mark.parametrize("by_layer", [(1e-5, 2e-5), (0.3, 2e-5), (2e-5, 0.3), (0.3, 0.2)])
def test_the_worst_layers_are_left_out(by_layer, tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    arrays = dict(load_arrays(profile, tiny_profile))
    place = profile.statistics.damage.codecs.index("int8")
    for name in ("key_codec_damage", "value_codec_damage"):
        harm = arrays[name].copy()
        for layer, damage in enumerate(by_layer):
            harm[layer, ..., place, :] = damage / (2 * harm.shape[2] * harm.shape[-1])
        arrays[name] = harm
    path = tmp_path / "profile.json"
    save_profile(profile, arrays, path)
    _, values = exported(tmp_path, path)
    assert values["kv_cache_dtype"] == "int8_per_token_head"
    assert values["kv_cache_dtype_skip_layers"] == [str(layer) for layer in (0, 1) if by_layer[layer] > LEFT]
    np.testing.assert_allclose(list(values["damage_by_layer"].values()), by_layer, rtol=1e-3)
    assert values["damage_left"] == pytest.approx(sum(damage for damage in by_layer if damage <= LEFT), rel=1e-3)


def test_a_profile_without_codecs_is_refused(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    facts = profile.statistics.damage.model_copy(update={"codecs": [], "codec_policies": [], "codec_shares": []})
    old = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"damage": facts})})
    path = tmp_path / "old.json"
    save_profile(old, load_arrays(profile, tiny_profile), path)
    result, _ = exported(tmp_path, path)
    assert result.exit_code == 2
    assert "no damage was measured for int8 or fp8-e4m3" in result.stderr
