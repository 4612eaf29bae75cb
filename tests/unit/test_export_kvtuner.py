"""KVTuner's table of bits: the least damage there is at a mean, by brute force, and a file its reader takes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile import load_arrays, load_profile, save_profile
from kvprofile.errors import UsageError
from kvprofile.profile.export_kvtuner import BITS, choose, kvtuner
from tests.unit.conftest import run
from tests.unit.reference import PROPERTY


def read(text):
    """The table, read line by line: `{layer: {name: bits}}`."""
    table = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            layer = table.setdefault(int(line.removesuffix(":")), {})
        else:
            name, bits = line.strip().split(": ")
            layer[name] = int(bits)
    return table


@PROPERTY
@given(seed=st.integers(0, 2**31), layers=st.integers(1, 3), mean=st.floats(2, 8))
def test_no_other_table_of_the_mean_does_less_harm(seed, layers, mean):
    damage = 10 ** np.random.default_rng(seed).uniform(-6, 0, (layers, 2, len(BITS)))
    found = choose(damage, mean)
    assert found.mean() <= mean + 1e-9
    names, items = list(BITS), damage.reshape(-1, len(BITS))

    def harm(bits):
        return sum(items[item, names.index(one)] for item, one in enumerate(bits))

    allowed = [bits for bits in itertools.product(BITS, repeat=2 * layers) if np.mean(bits) <= mean + 1e-9]
    assert harm(found.ravel().tolist()) == pytest.approx(min(map(harm, allowed)))


def test_the_table_names_every_layer_and_keeps_the_sensitive_ones(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    arrays = dict(load_arrays(profile, tiny_profile))
    harm = arrays["key_codec_damage"].copy()
    harm[1] *= 1e3
    arrays["key_codec_damage"] = harm
    path, out = tmp_path / "profile.json", tmp_path / "bits.yaml"
    save_profile(profile, arrays, path)
    assert run("export", path, "--to", "kvtuner", "-o", out).exit_code == 0
    table = read(out.read_text())
    assert list(table) == [0, 1]
    assert table[1]["nbits_key"] == 8
    assert np.mean([list(bits.values()) for bits in table.values()]) <= 4
    assert run("export", path, "--to", "kvtuner", "--bits", "8", "-o", out, "--force").exit_code == 0
    assert {bits for entry in read(out.read_text()).values() for bits in entry.values()} == {8}


def test_what_cannot_be_exported_is_told(tiny_profile, tmp_path):
    profile, out = load_profile(tiny_profile), tmp_path / "bits.yaml"
    with pytest.raises(UsageError, match="--bits 9 is no mean of 8, 4 and 2 bits"):
        kvtuner(profile, 9)
    result = run("export", tiny_profile, "--to", "vllm", "--bits", "4", "-o", out)
    assert result.exit_code == 2
    assert "--bits is for --to kvtuner" in result.stderr
    facts = profile.statistics.damage.model_copy(update={"codecs": [], "codec_policies": [], "codec_shares": []})
    old = profile.model_copy(update={"statistics": profile.statistics.model_copy(update={"damage": facts})})
    save_profile(old, load_arrays(profile, tiny_profile), tmp_path / "old.json")
    result = run("export", tmp_path / "old.json", "--to", "kvtuner", "-o", out)
    assert result.exit_code == 2
    assert "no damage was measured for int8, int4, int2" in result.stderr
