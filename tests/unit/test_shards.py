"""Shards of a calibration, measured apart and joined: the numbers of one process, or one line that says what is wrong."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from kvprofile import load_profile
from kvprofile.calibration.partials import read_header, sample_files
from tests.unit.conftest import run, save_tiny_model
from tests.unit.test_cli import refused

SIZE = (
    *("--tokens", 256, "--samples", 5, "--held-out", 2, "--policy", "h2o"),
    *("--device", "cpu", "--dtype", "float32"),
)


def calibrated(folder, text, output, *more):
    result = run("calibrate", folder, "--data", text, "-o", output, *SIZE, *more)
    assert result.exit_code == 0, result.output
    return result


def values(path):
    """A profile's JSON without what differs by its name and its making."""
    found = json.loads(path.read_text())
    found.pop("created")
    found["statistics"]["arrays"].pop("file")
    return found


@pytest.fixture(scope="module")
def whole(tiny_folder, tiny_text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "p.json"
    calibrated(tiny_folder, tiny_text_file, output)
    return output


@pytest.fixture(scope="module")
def shards(tiny_folder, tiny_text_file, tmp_path_factory):
    """Two machines' folders: samples 1, 3 and 5 in one, 2 and 4 in the other."""
    folders = []
    for number in (1, 2):
        output = tmp_path_factory.mktemp(f"machine{number}") / "p.json"
        told = calibrated(tiny_folder, tiny_text_file, output, "--shard", f"{number}/2").stderr
        assert f"Wrote {4 - number} of 5 samples to {output.with_suffix('.partial')}" in told
        assert [path.name for path in output.parent.iterdir()] == ["p.partial"]
        folders.append(output.with_suffix(".partial"))
    assert [[read_header(path).index for path in sample_files(folder)] for folder in folders] == [[0, 2, 4], [1, 3]]
    return folders


def test_shards_join_to_the_bytes_of_one_process(whole, shards, tmp_path):
    output = tmp_path / "p.json"
    # The order in which they are named does not matter; the model is not needed.
    result = run("merge", *reversed(shards), "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["check"] is None
    assert "not checked on held-out text" in result.stderr
    assert output.with_suffix(".safetensors").read_bytes() == whole.with_suffix(".safetensors").read_bytes()
    assert values(output) == {**values(whole), "check": None}
    assert all(sample_files(folder) for folder in shards)  # they are the user's

    quarter = tmp_path / "quarter.json"
    assert run("merge", *shards, "-o", quarter, "--budget", 0.25, "--objective", "recall", "-q").stderr == ""
    assert load_profile(quarter).plan.predicted_ratio == pytest.approx(0.25, abs=1e-6)


def test_the_check_is_made_where_the_model_is(whole, shards, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    checked = ("merge", *shards, "-o", output, "--check", tiny_folder, "--device", "cpu")
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[200:])
    refused(run(*checked, "--data", other), 3, "another model or text: their text is", "--data")
    stranger = save_tiny_model(tmp_path / "stranger", seed=5)
    refused(run(*checked[:-3], stranger, *checked[-2:], "--data", tiny_text_file), 3, "their weights is")
    assert not output.exists()
    result = run(*checked, "--data", tiny_text_file)
    assert result.exit_code == 0, result.output
    assert values(output) == values(whole)


def test_a_missing_shard_is_named(shards, tmp_path):
    result = run("merge", shards[0], "-o", tmp_path / "p.json")
    refused(result, 1, "2 of 5 samples are missing: 2, 4", "--shard 2/2")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_given_twice(shards, tmp_path):
    refused(run("merge", *shards, shards[0], "-o", tmp_path / "p.json"), 1, "sample 1 is there twice", "once")
    shutil.copytree(shards[1], tmp_path / "copy")
    refused(run("merge", *shards, tmp_path / "copy", "-o", tmp_path / "p.json"), 1, "sample 2 is there twice, in ")


def test_partials_of_different_runs(shards, tiny_folder, tiny_text_file, tmp_path):
    calibrated(tiny_folder, tiny_text_file, tmp_path / "q.json", "--shard", "2/2", "--seed", 1)
    result = run("merge", shards[0], tmp_path / "q.partial", "-o", tmp_path / "p.json")
    refused(result, 1, "is of another run", "its text is", "the partials of one run")
    # Nor may another run's samples come into the same folder.
    again = ("--shard", "1/2", "--seed", 2)
    result = run("calibrate", tiny_folder, "--data", tiny_text_file, "-o", tmp_path / "q.json", *SIZE, *again)
    refused(result, 1, "q.partial belongs to another calibration: its text is")


def test_a_damaged_partial(shards, tmp_path):
    shutil.copytree(shards[1], tmp_path / "copy")
    file = sample_files(tmp_path / "copy")[0]
    arguments = ("merge", shards[0], tmp_path / "copy", "-o", tmp_path / "p.json")
    good = file.read_bytes()
    header = read_header(file)
    strange = good.replace(b'\\"sample\\": 2', b'\\"sample\\": 9')
    assert strange != good
    for bad in (good[: len(good) // 2], good[:-1], b"", strange):
        file.write_bytes(bad)
        refused(run(*arguments), 1, str(file), "measure its sample again")
    file.write_bytes(good)
    metadata = {"kvprofile": _metadata(file)}
    arrays = load_file(file)
    save_file({**arrays, "map/samples": arrays["map/samples"][:1]}, file, metadata=metadata)
    assert read_header(file) == header
    refused(run(*arguments), 1, str(file), "does not hold what its run measures")
    refused(run("merge", tmp_path, "-o", tmp_path / "p.json"), 1, "holds no sample-*.safetensors", ".partial")
    refused(run("merge", tmp_path / "none", "-o", tmp_path / "p.json"), 1, "none is no folder")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("format",), 2),
        (("sample",), 0),
        (("sample",), 6),
        (("sample",), float("inf")),
        (("sample",), None),
        (("shards",), 0),
        (("run",), []),
        (("run", "base"), "nobody"),
        (("run", "candidates"), ["nobody"]),
        (("run", "mix", "passages"), -1),
        (("run", "model", "layers"), 0),
        (("run", "model", "layers"), 10**9),
        (("run", "model", "attention"), ["full_attention"] * 3),
        (("run", "calibration", "measured", "tokens"), 0),
        (("run", "calibration", "measured", "samples"), -1),
        (("run", "policies", "h2o", "affinity"), 3),
        (("run", "surprise"), 1),
    ],
)
def test_strange_facts_in_a_partial(place, value, shards, tmp_path):
    shutil.copytree(shards[1], tmp_path / "copy")
    file = sample_files(tmp_path / "copy")[0]
    facts = json.loads(_metadata(file))
    part = facts
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    save_file(load_file(file), file, metadata={"kvprofile": json.dumps(facts)})
    result = run("merge", shards[0], tmp_path / "copy", "-o", tmp_path / "p.json")
    refused(result, 1, f"{file} is damaged or no sample of kvprofile", "measure its sample again")


def test_statistics_that_no_machine_holds(shards, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr("kvprofile.calibration.runs.empty_statistics", full)
    refused(run("merge", *shards, "-o", tmp_path / "p.json"), 1, "no memory for the statistics of 2 layers")


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata()["kvprofile"]


@pytest.mark.parametrize("shard", ["0/8", "9/8", "x", "1/", "/2", "-1/2", "1/2/3", "2"])
def test_a_shard_that_is_none(shard, tiny_folder):
    refused(run("calibrate", tiny_folder, f"--shard={shard}"), 2, f"--shard {shard}", "for example 2/8")


def test_more_shards_than_samples(tiny_folder, tiny_text_file, tmp_path):
    size = ("--data", tiny_text_file, "-o", tmp_path / "p.json", *SIZE)
    refused(run("calibrate", tiny_folder, *size, "--shard", "2/6"), 2, "--shard 2/6 of 5 samples", "fewer shards")
    refused(run("calibrate", tiny_folder, *size, "--shard", "2/5", "--report"), 2, "--shard only measures")
    assert list(tmp_path.iterdir()) == []


def test_shards_may_fill_one_folder_and_go_on(whole, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    calibrated(tiny_folder, tiny_text_file, output, "--shard", "1/2")
    calibrated(tiny_folder, tiny_text_file, output, "--shard", "2/2")
    folder = output.with_suffix(".partial")
    again = ("calibrate", tiny_folder, "--data", tiny_text_file, "-o", output, *SIZE)
    refused(run(*again, "--shard", "2/2"), 1, "p.partial is left from an interrupted run", "--resume", "--force")
    sample_files(folder)[3].unlink()
    told = run(*again, "--shard", "2/2", "--resume")
    assert "going on after 1 of 2 samples" in told.stderr
    # Beginning a shard anew leaves the other shards alone.
    assert run(*again, "--shard", "1/2", "--force").exit_code == 0
    assert len(sample_files(folder)) == 5
    # A whole run takes what shards have measured.
    told = run(*again, "--resume")
    assert "going on after 5 of 5 samples" in told.stderr
    assert output.with_suffix(".safetensors").read_bytes() == whole.with_suffix(".safetensors").read_bytes()
    assert values(output) == values(whole)
    assert not folder.exists()
