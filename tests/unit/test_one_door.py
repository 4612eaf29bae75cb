"""What one reader of a profile refuses, all refuse; and its arrays are what it says, where it says."""

import copy
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from kvprofile import KVMerger, load_arrays, load_profile, save_profile
from kvprofile.cli import main
from kvprofile.errors import LONGEST, KVProfileError, MismatchError
from kvprofile.files import sha256_of
from tests.unit.builders import build_profile
from tests.unit.test_profile import ARRAYS

# Found by mutating profiles: each was loaded by the runtime, or ended in a TypeError inside `generate`.
REFUSED_BY_ONE_ONLY = [
    (("policies", "gauss", "affinity"), None),
    (("policies", "gauss", "rule"), None),
    (("policies", "gauss", "protection", "heavy_share"), 5000),
    (("policies", "gauss", "protection", "recent"), -32),
    (("policies", "gauss", "protection", "recent"), 1e308),
    (("policies", "gauss", "protection", "recent"), 10**30),
    (("policies", "gauss", "combination", "sigma"), 1e308),
    (("policies", "gauss", "seed"), 2**64),
    (("plan", "layers"), "one missing"),
    (("plan", "layers"), "one twice"),
    (("plan", "layers", 0, "heads", 0, "epsilon"), 1e308),
    (("plan", "layers", 0, "heads", 0, "share"), True),
    (("plan", "mode"), "threshold"),
    (("model", "layers"), 10**12),
    (("statistics", "thresholds"), []),
    (("schema_version",), True),
    (("schema_version",), 1.5),
]
ABSENT = object()


def changed(place, value):
    values = json.loads(build_profile().to_json())
    values["plan"]["mode"] = "exact"
    values["plan"]["layers"][0]["heads"][0] = {"policy": "gauss", "epsilon": None, "share": 0.5, "damage": None}
    part = values
    for step in place[:-1]:
        part = part[step]
    if value == "one missing":
        del part[place[-1]][-1]
    elif value == "one twice":
        part[place[-1]].append(part[place[-1]][-1])
    elif value is ABSENT:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return values


@pytest.mark.parametrize(("place", "value"), REFUSED_BY_ONE_ONLY, ids=str)
def test_every_door_refuses_the_same(place, value, tmp_path):
    values = changed(place, value)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    for door in (load_profile, KVMerger.from_profile):
        with pytest.raises(MismatchError) as caught:
            door(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(MismatchError):
        KVMerger.from_profile(values)
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert result.exit_code == 3
    assert len(result.output.strip().splitlines()) == 1


def test_the_unchanged_profile_comes_through_every_door(tmp_path):
    values = changed(("plan", "mode"), "exact")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    profile = load_profile(path)
    settings = [KVMerger.from_profile(source).settings for source in (path, str(path), values, profile)]
    for other in settings:
        assert other.facts == settings[0].facts
        assert other.layers[0].policies == settings[0].layers[0].policies
        assert other.layers[0].share.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", object()], ids=["nan", "set", "bytes", "object"])
def test_values_that_are_no_json_are_refused(value):
    with pytest.raises(MismatchError, match="is no JSON"):
        KVMerger.from_profile({**changed(("plan", "mode"), "exact"), "check": value})
    with pytest.raises(MismatchError):
        KVMerger.from_profile(value if not isinstance(value, float) else [value])


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"schema_version": 1, "plan": ' + "[" * 100_000 + "]" * 100_000 + "}")
    for door in (load_profile, KVMerger.from_profile):
        with pytest.raises(MismatchError):
            door(path)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(MismatchError):
        KVMerger.from_profile({"schema_version": 1, "plan": deep})


def test_a_policy_nobody_registered_is_told():
    values = changed(("policies", "gauss", "affinity"), "x-nobody-knows")
    with pytest.raises(MismatchError, match=r"policy gauss cannot be run here: .*x-nobody-knows"):
        KVMerger.from_profile(values)


def test_messages_are_one_short_line():
    error = KVProfileError("first\nsecond " + "x" * 10**6)
    assert str(error).startswith("first second xxx")
    assert len(str(error)) < LONGEST + 10


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "folder/x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "..", "x.bin", ""),
        *("x" * 5000 + ".safetensors", "nul\0.safetensors", "C:x.safetensors"),
    ],
    ids=lambda name: ascii(name[:24]),
)
def test_the_arrays_lie_beside_the_profile_and_nowhere_else(name):
    values = changed(("statistics", "arrays"), {"file": name, "sha256": "0" * 64})
    with pytest.raises(MismatchError, match="bare name"):
        KVMerger.from_profile(values)


def saved(folder, arrays=ARRAYS):
    folder.mkdir(exist_ok=True)
    save_profile(build_profile(), dict(arrays), folder / "profile.json")
    return folder / "profile.json"


def plan(source, output, *more):
    return CliRunner().invoke(main, ["plan", str(source), "--budget", "0.9", "-o", str(output), *more])


def test_a_plan_takes_arrays_of_its_own_name_along(tmp_path):
    source = saved(tmp_path / "here")
    other = tmp_path / "other"
    other.mkdir()
    result = plan(source, other / "nine.json")
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(other)) == ["nine.json", "nine.safetensors"]
    assert f"Wrote {other / 'nine.safetensors'}" in result.output
    planned = load_profile(other / "nine.json")
    assert planned.statistics.arrays.file == "nine.safetensors"
    for name, array in load_arrays(planned, other / "nine.json").items():
        assert (array == ARRAYS[name]).all()


def test_a_plan_overwrites_nothing_without_force(tmp_path):
    source = saved(tmp_path / "here")
    other = tmp_path / "other"
    other.mkdir()
    (other / "profile.safetensors").write_text("somebody else's")
    (other / "nine.safetensors").write_text("mine")
    result = plan(source, other / "nine.json")
    assert result.exit_code == 1
    assert "nine.safetensors exists" in result.output
    assert not (other / "nine.json").exists()
    assert plan(source, other / "nine.json", "--force").exit_code == 0
    assert (other / "profile.safetensors").read_text() == "somebody else's"
    load_arrays(load_profile(other / "nine.json"), other / "nine.json")


def test_a_plan_in_its_own_place_keeps_its_arrays(tmp_path):
    source = saved(tmp_path / "here")
    before = (tmp_path / "here/profile.safetensors").read_bytes()
    assert plan(source, source, "--force").exit_code == 0
    assert (tmp_path / "here/profile.safetensors").read_bytes() == before
    assert load_profile(source).plan.budget == 0.9
    assert sorted(os.listdir(tmp_path / "here")) == ["profile.json", "profile.safetensors"]


def with_arrays(folder, data):
    """A profile beside arrays of these bytes, with the right SHA-256."""
    source = saved(folder)
    beside = folder / "profile.safetensors"
    beside.unlink()
    beside.write_bytes(data)
    values = json.loads(source.read_text())
    values["statistics"]["arrays"]["sha256"] = sha256_of(beside)
    source.write_text(json.dumps(values))
    return source


WHOLE = save({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()})


def replaced(**arrays):
    kept = {name: np.ascontiguousarray(array) for name, array in {**ARRAYS, **arrays}.items() if array is not None}
    return save(kept)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (WHOLE[: len(WHOLE) // 2], "no complete .safetensors file"),
        (b"", "no complete .safetensors file"),
        (b"\x80\x04N.", "no complete .safetensors file"),  # a pickle
        (b"\xff" * 64, "no complete .safetensors file"),
        (replaced(similarity_map=None), "holds no similarity_map"),
        (replaced(similarity_map=np.zeros((2, 2, 4, 5))), "similarity_map is"),
        (replaced(similarity_map=np.zeros((2, 2, 0, 0))), "similarity_map is empty"),
        (replaced(key_histogram=np.zeros((3, 2, 3))), "key_histogram is"),
        (replaced(distances=np.zeros(6)), "similarity_by_distance is"),
        (replaced(key_histogram=np.zeros((2, 2, 3), bool)), "not numbers"),
    ],
)
def test_damaged_arrays_are_told_whoever_reads_them(data, told, tmp_path):
    source = with_arrays(tmp_path / "here", data)
    for arguments in (["validate", source], ["report", source, "-o", tmp_path / "report.html"]):
        result = CliRunner().invoke(main, [str(part) for part in arguments])
        assert result.exit_code == 1, result.output
        assert told in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "report.html").exists()


def test_arrays_that_are_no_file_are_told(tmp_path):
    source = saved(tmp_path / "here")
    beside = tmp_path / "here/profile.safetensors"
    beside.unlink()
    os.mkfifo(beside)
    with pytest.raises(KVProfileError, match="it is a pipe, a device or a socket"):
        load_arrays(load_profile(source), source)


def test_a_hand_written_profile_cannot_be_planned_anew():
    from kvprofile import replan
    from tests.unit.tiny_models import tiny_model, uniform_values

    values = uniform_values(tiny_model(), share=0.5)
    with pytest.raises(MismatchError, match="nothing was measured"):
        replan(load_values(values), None, 0.5)


def load_values(values):
    from kvprofile.profile.storage import profile_of

    return profile_of(copy.deepcopy(values))
