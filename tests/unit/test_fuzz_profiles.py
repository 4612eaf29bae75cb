"""Profiles and their arrays mutated at every place: read as written by every door, or refused by all in one line."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile import KVMerger, load_arrays, load_model, load_profile, replan
from kvprofile.files import sha256_of
from kvprofile.profile.schema import SCHEMA_VERSION
from kvprofile.report.html import make_subject, write_report
from tests.fuzzing import EXAMPLES, damaged, fuzzing, mutate, mutations, outcomes, refusal


@pytest.fixture(scope="module")
def place(tiny_profile, tmp_path_factory) -> Path:
    """A folder with the calibrated tiny profile and its arrays."""
    folder = tmp_path_factory.mktemp("fuzz")
    for suffix in (".json", ".safetensors"):
        source = tiny_profile.with_suffix(suffix)
        (folder / source.name).write_bytes(source.read_bytes())
    return folder / tiny_profile.name


@pytest.fixture(scope="module")
def whole(place):
    return json.loads(place.read_text())


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32").model


@pytest.fixture(scope="module", autouse=True)
def _told():
    yield
    if EXAMPLES:
        print(dict(sorted(outcomes.items())))


def same(read, written) -> bool:
    """True if all that was written was read; what the schema fills in may be more."""
    if isinstance(written, dict):
        return isinstance(read, dict) and all(key in read and same(read[key], value) for key, value in written.items())
    if isinstance(written, list):
        return isinstance(read, list) and len(read) == len(written) and all(map(same, read, written))
    if isinstance(written, bool) or isinstance(read, bool):
        return read is written
    return read == written


def generate(merger, model):
    """A prompt, some tokens more than a chunk, and nothing that is not a number."""
    merger.attach(model)
    try:
        with torch.inference_mode():
            cache = merger.cache()
            tokens = torch.arange(1, 97)[None] % 60 + 1
            logits = model(tokens, past_key_values=cache).logits
            for token in range(34):
                logits = model(torch.tensor([[token + 1]]), past_key_values=cache).logits
            assert bool(logits.isfinite().all())
            assert cache.get_seq_length() == 96 + 34
    finally:
        merger.detach()


def runs(told):
    """True where the runtime takes a valid profile, or lacks what a profile alone does not bring: foreign names, and means."""
    return told is None or any(part in told for part in ("cannot be run here", "packs keys", "key_mean is"))


def written(path, values):
    try:
        path.write_text(json.dumps(values), encoding="utf-8")
    except (UnicodeEncodeError, ValueError, RecursionError):
        return False
    return True


@fuzzing(120)
@given(data=st.data())
def test_both_doors_agree_on_a_mutated_profile(data, place, whole, tiny):
    budget = data.draw(st.sampled_from([0.3, 0.6, 0.9]))
    values = copy.deepcopy(whole)
    mutate(values, data.draw(mutations(whole)))
    path = place.with_name("mutated.json")
    if not written(path, values):
        return
    profiles, mergers = [], []
    by_file = refusal(lambda: profiles.append(load_profile(path)))
    by_path = refusal(lambda: mergers.append(KVMerger.from_profile(path)))
    by_value = refusal(lambda: mergers.append(KVMerger.from_profile(values)))
    assert (by_file is None) == runs(by_path) == runs(by_value), (
        by_file,
        by_path,
        by_value,
    )
    if by_file is not None:
        outcomes["refused at the door"] += 1
        return
    profile = profiles[0]
    # An older version is read as the newest.
    assert same(json.loads(profile.to_json()), {**values, "schema_version": SCHEMA_VERSION})
    outcomes["loaded"] += 1
    if mergers:
        outcomes["generated" if refusal(lambda: generate(mergers[0], tiny)) is None else "refused by the model"] += 1
    arrays = []
    if refusal(lambda: arrays.append(load_arrays(profile, path))) is not None:
        outcomes["refused its arrays"] += 1
        return
    planned = []
    in_bytes = data.draw(st.booleans())
    amount = {"bytes" if in_bytes else "budget": budget}
    told = refusal(lambda: planned.append(replan(profile, arrays[0].get("damage_mean"), **amount, measured=arrays[0])))
    outcomes["planned" if told is None else "refused to plan"] += 1
    for one in planned:
        assert all(0 <= head.share <= 1 for layer in one.plan.layers for head in layer.heads)
        if in_bytes:
            assert one.plan.predicted_bytes <= budget + 1e-6
        else:
            assert math.isclose(one.plan.predicted_ratio, budget, abs_tol=0.1)


@fuzzing(4)
@given(data=st.data())
def test_a_mutated_profile_is_reported_or_refused(data, place, whole):
    values = copy.deepcopy(whole)
    mutate(values, data.draw(mutations(whole)))
    path = place.with_name("reported.json")
    profiles = []
    if not written(path, values) or refusal(lambda: profiles.append(load_profile(path))) is not None:
        return

    def report():
        arrays = load_arrays(profiles[0], path) if profiles[0].statistics.arrays else None
        write_report([make_subject("mutated", profiles[0], arrays)], path.with_suffix(".html"), force=True)

    outcomes["reported" if refusal(report) is None else "refused to report"] += 1


@fuzzing(60)
@given(data=st.data())
def test_mutated_arrays_are_read_or_refused(data, place, whole):
    """With the SHA-256 of what they became, so that nothing but their content is left to object to."""
    path = place.with_name("arrays.json")
    beside = path.with_suffix(".safetensors")
    beside.write_bytes(data.draw(damaged(place.with_suffix(".safetensors").read_bytes())))
    values = copy.deepcopy(whole)
    values["statistics"]["arrays"] = {"file": beside.name, "sha256": sha256_of(beside)}
    path.write_text(json.dumps(values))
    profile = load_profile(path)
    arrays = []
    if refusal(lambda: arrays.append(load_arrays(profile, path))) is not None:
        outcomes["refused damaged arrays"] += 1
        return
    outcomes["read damaged arrays"] += 1
    refusal(lambda: replan(profile, arrays[0].get("damage_mean"), 0.6, measured=arrays[0]))


@fuzzing(60)
@given(data=st.data())
def test_damaged_json_is_read_or_refused(data, place):
    path = place.with_name("bytes.json")
    path.write_bytes(data.draw(damaged(place.read_bytes())))
    doors = [refusal(lambda: load_profile(path)), refusal(lambda: KVMerger.from_profile(path))]
    assert (doors[0] is None) == (doors[1] is None or "cannot be run here" in doors[1]), doors
