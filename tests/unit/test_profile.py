"""The profile file: what is saved is what is loaded, and whatever else lies there is refused in one line."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.measure.ratios import THRESHOLDS as RATIO_THRESHOLDS
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.files import atomic_write, sha256_of
from kvprofile.profile.fingerprint import difference, model_facts
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import ModelFacts
from kvprofile.profile.storage import load_arrays, load_profile, save_profile
from tests.unit.builders import THRESHOLDS, build_profile
from tests.unit.reference import PROPERTY
from tests.unit.test_report_figures import large

PROFILES = Path(__file__).parents[2] / "profiles"
WHAT_TO_DO = re.compile(r"\b(calibrate|copy|make one|update|give|check|choose|run)\b")
ARRAYS = {
    "key_histogram": np.arange(12, dtype=np.int64).reshape(2, 2, 3),
    "value_histogram": np.arange(12, dtype=np.int64).reshape(2, 2, 3),
    "distances": np.arange(5, dtype=np.int32),
    "similarity_by_distance": np.linspace(-1, 1, 20, dtype=np.float32).reshape(2, 2, 5),
    "similarity_map": np.linspace(-1, 1, 64, dtype=np.float16).reshape(2, 2, 4, 4),
    "not contiguous": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2],
}


def _assert_told(caught, path, exit_code):
    """One line that names the file and says what to do next."""
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert WHAT_TO_DO.search(message.replace(str(path), "")), f"no next step in: {message}"
    assert caught.value.exit_code == exit_code


def _refused(path, exit_code, match=None):
    expected = {1: KVProfileError, 3: MismatchError}[exit_code]
    with pytest.raises(expected, match=match) as caught:
        load_profile(path)
    _assert_told(caught, path, exit_code)
    return str(caught.value)


# What is written is what is read.


def test_a_profile_round_trips_to_the_byte(tmp_path):
    profile = build_profile()
    path = profile.save(tmp_path / "profile.json")
    assert path == tmp_path / "profile.json"
    loaded = load_profile(str(path))
    assert loaded == profile
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes() == build_profile().to_json().encode()


def test_the_file_is_strict_json_one_list_of_numbers_or_one_head_a_line(tmp_path):
    text = build_profile().save(tmp_path / "profile.json").read_text(encoding="utf-8")
    assert json.loads(text) == build_profile().model_dump(mode="json")
    assert text.endswith("}\n")
    lines = [line.strip() for line in text.splitlines()]
    assert lines.count("[0.1,0.3,0.6,1.0],") == 2
    assert f'"thresholds": [{",".join(map(str, THRESHOLDS))}],' in lines
    stored = '"key_codec": "none", "value_codec": "none", "codec_damage": null'
    assert lines.count('{"policy": "gauss", "epsilon": 0.7, "share": 0.5, "damage": null, ' + stored + "},") == 2
    assert list(json.loads(text)) == list(Profile.model_fields)


def _numbers(low, high):
    return st.floats(low, high, allow_nan=False)


@settings(PROPERTY, max_examples=100)
@given(
    texts=st.lists(
        st.text() | st.sampled_from(["[ 1, 2 ]", "[\n 1,\n 2\n]", '",\n [\n 1\n]', "\\[\n1\n]", "\u2028[1, 2]\x85"]),
        min_size=4,
        max_size=4,
    ),
    shares=st.lists(_numbers(0, 1), min_size=2, max_size=2),
    thresholds=st.lists(_numbers(-1, 1.01), min_size=4, max_size=4).map(sorted),
    epsilon=st.none() | _numbers(-1, 1.01),
)
def test_any_text_and_any_number_survives(texts, shares, thresholds, epsilon):
    name, command, policy, text = texts
    values = build_profile(name=name, command=command, policy=policy).model_dump()
    values["calibration"]["text"] = text
    values["calibration"]["measured"]["kinds"] = {text: 1, name: 2}
    values["model"]["rope"] = {text: [1, 2.5, None, [name]]}
    values["statistics"]["thresholds"] = thresholds
    for layer in values["plan"]["layers"]:
        for head, share in zip(layer["heads"], shares, strict=True):
            head.update(share=share, epsilon=epsilon)
    values["plan"]["mode"] = "exact"
    profile = Profile.model_validate(values)
    assert json.loads(profile.to_json()) == profile.model_dump(mode="json")
    assert Profile.model_validate_json(profile.to_json()) == profile
    assert Profile.model_validate_json(profile.to_json()).to_json() == profile.to_json()


@pytest.mark.parametrize("text", ["[ 1, 2 ]", "[\n 1,\n 2\n]", "naïve [\r\n1\r\n] \u2028 \U0001f600"])
def test_brackets_in_texts_survive_the_file(tmp_path, text):
    profile = build_profile(name=text, command=text)
    path = profile.save(tmp_path / "profile.json")
    assert load_profile(path) == profile
    assert load_profile(path).model.name == text


def test_a_policys_fixed_width_is_read_as_a_number(tmp_path):
    values = build_profile().model_dump()
    values["policies"]["gauss"]["combination"]["sigma"] = 5.0
    profile = Profile.model_validate(values)
    loaded = load_profile(profile.save(tmp_path / "profile.json"))
    assert loaded.policies["gauss"].combination.sigma == 5.0
    assert loaded == profile


def test_saving_does_not_overwrite_unless_forced(tmp_path):
    path = build_profile().save(tmp_path / "profile.json")
    before = path.read_bytes()
    with pytest.raises(KVProfileError, match="exists") as caught:
        build_profile(name="other").save(path)
    _assert_told(caught, path, 1)
    assert "--force" in str(caught.value)
    assert path.read_bytes() == before
    build_profile(name="other").save(path, force=True)
    assert load_profile(path).model.name == "other"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_profile_and_no_other_file(monkeypatch, tmp_path, failure):
    path = build_profile().save(tmp_path / "profile.json")
    before = path.read_bytes()

    def fail(*_args):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    expected = KVProfileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        build_profile(name="other").save(path, force=True)
    if expected is KVProfileError:
        _assert_told(caught, path, 1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["profile.json"]
    with pytest.raises(expected):
        save_profile(build_profile(), ARRAYS, tmp_path / "new.json")
    assert os.listdir(tmp_path) == ["profile.json"]


# What is no profile.


def test_a_missing_file(tmp_path):
    _refused(tmp_path / "none.json", 1, "no profile at .*; make one with")


def test_a_folder(tmp_path):
    _refused(tmp_path, 1, "cannot read the profile")


def test_a_binary_file(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(b"\x80\x81GGUF\xff\x00")
    _refused(path, 1, "cannot read the profile")


@pytest.mark.parametrize(
    "text", ["", "not json", "schema_version: 1\n", "{'schema_version': 1}", "\ufeff{}", "\x00" * 9]
)
def test_text_that_is_not_json(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="utf-8")
    _refused(path, 3, "is not a complete JSON file")


@pytest.mark.parametrize("text", ["{}", "[]", "null", "7", '"profile"', '{"plan": {}}', '{"schema_version": null}'])
def test_json_that_is_no_profile(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    _refused(path, 3, "is not a kvprofile profile: it has no schema_version")


def test_every_truncation(tmp_path):
    text = build_profile().to_json()
    path = tmp_path / "profile.json"
    for length in range(0, len(text.rstrip()), 97):
        path.write_text(text[:length])
        _refused(path, 3, "is not a complete JSON file")


@pytest.mark.parametrize("version", [3, 0, 17, "2", "one", [1]])
def test_another_version(tmp_path, version):
    message = _refused(_edited(tmp_path, ("schema_version",), version), 3, "reads version 1 and 2; update kvprofile")
    assert str(version) in message.partition("schema version ")[2].partition(", this")[0]


def test_a_version_as_a_text_is_not_called_the_version_it_should_be(tmp_path):
    message = _refused(_edited(tmp_path, ("schema_version",), "2"), 3)
    assert "schema version 2, this kvprofile reads" not in message


def _edited(folder, where, value):
    """A saved profile with one value replaced; `where` leads to it."""
    values = json.loads(build_profile().to_json())
    holder = values
    for key in where[:-1]:
        holder = holder[key]
    if value is _MISSING:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    path = folder / "edited.json"
    path.write_text(json.dumps(values))
    return path


_MISSING = object()
_HEAD = ("plan", "layers", 1, "heads", 0)
_DAMAGE = {
    "a text for a number": ((*_HEAD, "share"), "0.5"),
    "a number for a text": (("model", "name"), 7),
    "a truth value for a number": (("model", "layers"), True),
    "a fraction for a count": (("model", "layers"), 2.5),
    "a share above 1": ((*_HEAD, "share"), 1.2),
    "a share below 0": ((*_HEAD, "share"), -0.1),
    "a budget of 0": (("plan", "budget"), 0.0),
    "a ratio above 1": (("statistics", "layers", 0, "ratio", 1, 2), 1.01),
    "an extra key at the top": (("surprise",), 1),
    "an extra key inside": ((*_HEAD, "surprise"), 1),
    "a missing block": (("calibration",), _MISSING),
    "a missing key": ((*_HEAD, "epsilon"), _MISSING),
    "a missing head": (("plan", "layers", 1, "heads", 1), _MISSING),
    "a missing layer": (("plan", "layers", 0), _MISSING),
    "a layer out of order": (("plan", "layers", 0, "layer"), 1),
    "a missing layer of statistics": (("statistics", "layers", 1), _MISSING),
    "a missing curve": (("statistics", "layers", 1, "ratio", 0), _MISSING),
    "a missing point of a curve": (("statistics", "layers", 1, "ratio_std", 0, 3), _MISSING),
    "a missing threshold": (("statistics", "thresholds", 0), _MISSING),
    "thresholds out of order": (("statistics", "thresholds", 0), 0.9),
    "a head of an unknown policy": ((*_HEAD, "policy"), "magic"),
    "statistics of an unknown policy": (("statistics", "policy"), "magic"),
    "an unknown rule": (("policies", "gauss", "rule"), "cluster"),
    "an unknown affinity": (("policies", "gauss", "affinity"), "beauty"),
    "an unknown width": (("policies", "gauss", "combination", "sigma"), "max"),
    "an unknown mode": (("plan", "mode"), "fast"),
    "one kind of attention too few": (("model", "attention"), ["full_attention"]),
    "a short hash": (("model", "config_hash"), "abc"),
    "no heads": (("model", "kv_heads"), 0),
    "a negative protection": (("policies", "gauss", "protection", "first"), -1),
    # Values that are each allowed, but make no policy.
    "a width below 0": (("policies", "gauss", "combination", "sigma"), -1.0),
    "a rule that goes by cosine under another affinity": (
        ("policies", "gauss"),
        {**build_profile().policies["gauss"].model_dump(), "rule": "anchor", "affinity": "mass"},
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_an_edited_file(tmp_path, damage):
    where, value = _DAMAGE[damage]
    message = _refused(_edited(tmp_path, where, value), 3)
    assert "is not a valid profile: " in message
    assert "calibrate anew" in message


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("a share above 1", "plan.layers.1.heads.0.share"),
        ("an extra key inside", "plan.layers.1.heads.0.surprise"),
        ("a missing block", "calibration"),
        ("a missing head", "plan.layers[1] has 1 heads, not 2"),
        ("a missing point of a curve", "statistics.layers[1].ratio_std is not 2 x 4"),
        ("a head of an unknown policy", "unknown policies ['magic']"),
        ("a ratio above 1", "statistics.layers.0.ratio.1.2"),
    ],
)
def test_the_place_of_the_damage_is_named(tmp_path, damage, named):
    assert named in _refused(_edited(tmp_path, *_DAMAGE[damage]), 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(*_HEAD, "epsilon"), ("model", "rope", "rope_theta"), ("created", "seconds")])
def test_numbers_that_are_none(tmp_path, where, number):
    path = _edited(tmp_path, where, number)
    assert re.search("NaN|Infinity", path.read_text())
    _refused(path, 3, "(NaN|Infinity) is not allowed in a profile")


def test_a_number_too_large_to_hold(tmp_path):
    path = _edited(tmp_path, (*_HEAD, "epsilon"), 12345678)
    path.write_text(path.read_text().replace("12345678", "1e999"))
    _refused(path, 3)


def test_a_profile_in_memory_is_checked_as_well():
    values = build_profile().model_dump()
    values["plan"]["layers"][0]["heads"][0]["share"] = float("nan")
    with pytest.raises(ValueError, match="share"):
        Profile.model_validate(values)
    with pytest.raises(ValueError, match="frozen"):
        build_profile().plan.budget = 0.3


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_too_large_to_hold_is_refused_wherever_it_stands(tmp_path, number):
    path = _edited(tmp_path, ("model", "rope"), {"rope_theta": 12345678})
    path.write_text(path.read_text().replace("12345678", number))
    assert f"{number} is too large a number" in _refused(path, 3)


def test_a_name_that_comes_twice(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(build_profile().to_json().replace('"seed": 0,', '"seed": 0, "seed": 1,', 1))
    assert "'seed' comes twice" in _refused(path, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "it is a pipe, a device or a socket" in _refused(path, 1)
        with pytest.raises(KVProfileError, match="it is a pipe"):
            sha256_of(path)
    for name in (tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(KVProfileError, match="no profile at"):
            load_profile(name)
        with pytest.raises(KVProfileError, match="cannot write"):
            atomic_write(name, "")


def test_a_file_too_large_to_be_a_profile(tmp_path):
    with open(tmp_path / "profile.json", "wb") as stream:
        stream.truncate(2**29)  # takes no room: nothing is written
    assert "it has 536,870,912 bytes" in _refused(tmp_path / "profile.json", 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
def test_a_folder_that_takes_no_files():
    with pytest.raises(KVProfileError, match="/proc takes no files; choose another path"):
        build_profile().save("/proc/profile.json")


# The model it belongs to.


def _facts(**changes):
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, architectures=["Llama"]
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return model_facts(config)


def _profile_of(facts):
    return build_profile(model=ModelFacts(name="tiny", source="memory", revision=None, **facts).model_dump())


def test_facts_are_read_from_the_configuration():
    facts = _facts()
    assert {name: facts[name] for name in ("layers", "query_heads", "kv_heads", "head_dim")} == {
        "layers": 2,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
    }
    assert facts["model_type"] == "llama"
    assert facts["attention"] == ["full_attention"] * 2
    assert facts["rope"]["rope_theta"] == 10000.0


def test_a_profile_fits_the_model_it_was_made_for(tmp_path):
    profile = _profile_of(_facts())
    profile.check_model(_facts())
    load_profile(profile.save(tmp_path / "profile.json")).check_model(_facts())
    # What changes neither keys nor positions does not matter.
    profile.check_model(_facts(dtype="bfloat16", name_or_path="elsewhere", use_cache=False))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 3}, "layers is 2 in the profile and 3 in the model"),
        ({"num_attention_heads": 8}, "query heads is 4 in the profile and 8 in the model"),
        ({"num_key_value_heads": 4}, "kv heads is 2 in the profile and 4 in the model"),
        ({"head_dim": 32}, "head dim is 16 in the profile and 32 in the model"),
        ({"architectures": ["Other"]}, "architecture is Llama in the profile and Other in the model"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "500000.0"),
        ({"vocab_size": 77}, "the configurations differ (config_hash)"),
        ({"intermediate_size": 77}, "the configurations differ (config_hash)"),
        ({"max_position_embeddings": 77}, "the configurations differ (config_hash)"),
    ],
)
def test_another_model_is_refused_with_the_difference(change, named):
    profile, other = _profile_of(_facts()), _facts(**change)
    assert named in difference(profile.model.model_dump(), other)
    with pytest.raises(MismatchError) as caught:
        profile.check_model(other)
    message = str(caught.value)
    assert named in message
    assert "was made for tiny" in message
    assert message.endswith("calibrate this model")
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_layers_are_told_apart_by_their_attention():
    values = build_profile().model_dump()
    values["model"]["attention"] = ["sliding_attention", "full_attention"]
    values["plan"]["layers"] = values["plan"]["layers"][1:]
    profile = Profile.model_validate(values)
    assert profile.attention_layers() == [1]
    with pytest.raises(MismatchError, match=r"attention is .*sliding_attention.* in the profile"):
        profile.check_model(build_profile().model.model_dump())


# The arrays beside it.


def test_arrays_round_trip_beside_the_profile(tmp_path):
    path = tmp_path / "model.json"
    profile, paths = save_profile(build_profile(), ARRAYS, path)
    assert paths == [path, tmp_path / "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    loaded = load_profile(path)
    assert loaded == profile
    assert loaded.statistics.arrays.file == "model.safetensors"
    assert loaded.statistics.arrays.sha256 == sha256_of(paths[1])
    arrays = load_arrays(loaded, path)
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert (arrays[name] == array).all()


def test_the_same_profile_and_arrays_are_the_same_bytes(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        save_profile(build_profile(), ARRAYS, tmp_path / folder / "model.json")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("taken", ["model.json", "model.safetensors"])
def test_neither_file_is_overwritten_unless_forced(tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(KVProfileError, match="exists") as caught:
        save_profile(build_profile(), ARRAYS, tmp_path / "model.json")
    _assert_told(caught, tmp_path / taken, 1)
    assert os.listdir(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == "mine"
    profile, _ = save_profile(build_profile(), ARRAYS, tmp_path / "model.json", force=True)
    assert load_profile(tmp_path / "model.json") == profile
    assert sorted(load_arrays(profile, tmp_path / "model.json")) == sorted(ARRAYS)


def test_missing_arrays_are_told(tmp_path):
    path = tmp_path / "model.json"
    profile, (_, beside) = save_profile(build_profile(), ARRAYS, path)
    beside.unlink()
    with pytest.raises(KVProfileError, match="is missing; it belongs beside") as caught:
        load_arrays(profile, path)
    _assert_told(caught, beside, 1)
    assert str(path) in str(caught.value)


def test_arrays_of_another_run_are_told(tmp_path):
    path = tmp_path / "model.json"
    profile, (_, beside) = save_profile(build_profile(), ARRAYS, path)
    other = {**ARRAYS, "similarity_map": ARRAYS["similarity_map"] + np.float16(1)}
    save_profile(build_profile(), other, tmp_path / "other.json")
    os.replace(tmp_path / "other.safetensors", beside)
    with pytest.raises(KVProfileError, match="SHA-256 differs") as caught:
        load_arrays(profile, path)
    _assert_told(caught, beside, 1)
    beside.write_bytes(b"cut short")
    with pytest.raises(KVProfileError, match="SHA-256 differs"):
        load_arrays(profile, path)


def test_a_profile_without_arrays_is_told(tmp_path):
    path = build_profile().save(tmp_path / "model.json")
    with pytest.raises(KVProfileError, match="names no arrays file") as caught:
        load_arrays(load_profile(path), path)
    _assert_told(caught, path, 1)


def test_arrays_never_take_the_profiles_own_name(tmp_path):
    path = tmp_path / "model.safetensors"
    try:
        profile, paths = save_profile(build_profile(), ARRAYS, path, force=True)
    except KVProfileError:
        assert os.listdir(tmp_path) == []
    else:
        assert len(set(paths)) == 2
        assert load_profile(paths[0]) == profile
        assert sorted(load_arrays(profile, paths[0])) == sorted(ARRAYS)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("statistics", "damage"), {"policies": ["gauss"]}),
        (("plan", "objective"), "speed"),
        (("plan", "rule"), "equal"),
        ((*_HEAD, "damage"), "much"),
        (("policies", "gauss", "combination", "bias"), "size"),
        (("policies", "gauss", "combination", "count_bias"), True),
        (("policies", "gauss", "affinity"), "mean-attention"),
        (("check", "exact", "fidelity", "recall_kl_interval"), [0.1]),
        (("check", "uniform_policy"), _MISSING),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_a_plan_and_its_check_say_is_checked(tmp_path, where, value):
    assert "is not a valid profile: " in _refused(_edited(tmp_path, where, value), 3)


def test_a_profile_with_damage_round_trips(tmp_path):
    values = build_profile().model_dump()
    values["statistics"]["damage"] = {
        "policies": ["gauss"],
        "budgets": [0.1, 0.5],
        "kinds": ["recall", "continuation"],
        "passages": 16,
        "passage_tokens": 20,
        "continuation_tokens": 64,
    }
    values["plan"] |= {"policy": "auto", "rule": "damage", "predicted_damage": 0.25, "damage_bound": 0.2}
    values["plan"]["layers"][0]["heads"][0]["damage"] = 0.125
    profile = Profile.model_validate(values)
    loaded = load_profile(profile.save(tmp_path / "profile.json"))
    assert loaded == profile
    assert loaded.statistics.damage.budgets == [0.1, 0.5]
    assert loaded.check.exact.fidelity.recall_kl_interval == (0.008, 0.013)


def test_a_profile_of_a_thousand_heads_stays_below_a_megabyte():
    profile, _ = large(32, 32, CANDIDATES)
    values = profile.model_dump()
    # The builder has four thresholds, a real profile sixty-four.
    repeats = len(RATIO_THRESHOLDS) // len(values["statistics"]["thresholds"])
    values["statistics"]["thresholds"] = RATIO_THRESHOLDS.tolist()
    for layer in values["statistics"]["layers"]:
        layer["ratio"] = [sorted(curve * repeats) for curve in layer["ratio"]]
        layer["ratio_std"] = [[0.012, 0.123, 0.034, 0.0] * repeats for _ in layer["ratio_std"]]
    assert len(Profile.model_validate(values).to_json()) < 1_000_000


# Version 1, as older kvprofiles wrote it.


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_profile_of_version_1_is_read_without_loss_and_saved_as_version_2(name, tmp_path):
    before = json.loads((PROFILES / f"{name}.json").read_text())
    if before["schema_version"] != 1:  # made anew since: as an older kvprofile would have written it
        before = _of_version_1(before)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(before))
    profile = load_profile(path)
    after = json.loads(profile.to_json())
    assert after.pop("schema_version") == 2
    assert profile.plan.bytes is None
    assert all(
        (head.key_codec, head.value_codec, head.codec_damage) == ("none", "none", None)
        for layer in profile.plan.layers
        for head in layer.heads
    )
    assert {"schema_version": 1, **_of_version_1(after)} == before
    saved = load_profile(profile.save(tmp_path / "new.json"))
    assert saved == profile


def _of_version_1(values):
    """The same values without what version 2 adds."""
    added = {"bytes", "codec", "predicted_bytes", "predicted_codec_damage", "codecs", "codec_policies", "codec_shares"}
    added |= {"key_codec", "value_codec", "codec_damage", "window", "windows", "matching"}
    if isinstance(values, dict):
        kept = {name: _of_version_1(value) for name, value in values.items() if name not in added}
        return kept | ({"schema_version": 1} if "schema_version" in values else {})
    return [_of_version_1(value) for value in values] if isinstance(values, list) else values


CODECS = {"codecs": ["int8", "int4"], "codec_policies": ["gauss"], "codec_shares": [0.3, 1.0]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"codecs": []}, "or none of them"),
        ({"codec_shares": []}, "or none of them"),
        ({"codecs": ["int8", "int8"]}, "a codec twice"),
        ({"codecs": ["none"]}, "a codec twice, or none"),
        ({"codecs": ["int5"]}, "statistics.damage.codecs"),
        ({"codec_policies": ["h2o"]}, "one that was not measured"),
        ({"codec_shares": [0.5, 0.3]}, "must rise"),
        ({"codec_shares": [0.5, 1.5]}, "must rise above 0 and up to 1"),
    ],
    ids=str,
)
def test_what_is_said_of_codecs_must_hold_together(change, told, tmp_path):
    values = json.loads(build_profile().to_json())
    measured = {"policies": ["gauss"], "budgets": [0.5], "kinds": ["recall"]}
    sizes = {"passages": 1, "passage_tokens": 8, "continuation_tokens": 8}
    values["statistics"]["damage"] = {**measured, **sizes, **CODECS, **change}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    if told is None:
        assert load_profile(path).statistics.damage.codecs == ["int8", "int4"]
    else:
        _refused(path, 3, told)


@pytest.mark.parametrize("codec", ["int5", "", None, 8, "X-mine"])
@pytest.mark.parametrize("part", ["key_codec", "value_codec"])
def test_a_codec_nobody_knows(codec, part, tmp_path):
    _refused(_edited(tmp_path, ("plan", "layers", 0, "heads", 0, part), codec), 3, part)
    foreign = load_profile(_edited(tmp_path, ("plan", "layers", 0, "heads", 0, part), "x-mine"))
    assert getattr(foreign.plan.layers[0].heads[0], part) == "x-mine"
