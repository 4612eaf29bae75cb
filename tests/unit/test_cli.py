"""The command line as a user meets it: what works, and one clear line where something does not."""

import json
import shutil

import pytest
import torch

from kvprofile import load_profile
from tests.unit.conftest import run, save_tiny_model


def refused(result, code, *parts):
    """Exit code, one line on stderr with all the parts, nothing on stdout, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_calibrate_writes_a_profile_and_its_arrays(tiny_profile):
    profile = load_profile(tiny_profile)
    assert profile.plan.budget == 0.5
    assert profile.plan.predicted_ratio == pytest.approx(0.5, abs=1e-6)
    assert profile.check.exact.achieved.mean == pytest.approx(0.5, abs=1 / 256)
    assert tiny_profile.with_suffix(".safetensors").exists()
    assert sorted(path.name for path in tiny_profile.parent.iterdir()) == ["tiny.json", "tiny.safetensors"]


def test_the_same_command_gives_the_same_profile_but_for_created(tiny_profile, tiny_folder, tiny_text_file, tmp_path):
    path = tmp_path / "tiny.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 3, "--held-out", 2)
    assert run("calibrate", tiny_folder, "-o", path, *size).exit_code == 0
    first, second = (json.loads(file.read_text()) for file in (tiny_profile, path))
    first.pop("created")
    second.pop("created")
    assert first == second
    assert path.with_suffix(".safetensors").read_bytes() == tiny_profile.with_suffix(".safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["gauss", "kvmerger", "h2o", "absorb"])
def test_every_kind_of_policy_can_be_calibrated(policy, tiny_folder, tiny_text_file, tmp_path):
    path = tmp_path / "p.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 2, "--held-out", 1)
    result = run("calibrate", tiny_folder, "--policy", policy, "-o", path, *size)
    assert result.exit_code == 0, result.output
    profile = load_profile(path)
    assert {head.policy for layer in profile.plan.layers for head in layer.heads} <= {policy}
    assert profile.check.exact.achieved.mean == pytest.approx(0.5, abs=1 / 128)


def test_threshold_mode_with_uniform_shares(tiny_folder, tiny_text_file, tmp_path):
    path = tmp_path / "p.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 4, "--held-out", 2)
    choices = ("--policy", "gauss", "--rule", "uniform", "--mode", "threshold")
    result = run("calibrate", tiny_folder, "-o", path, *size, *choices)
    assert result.exit_code == 0, result.output
    check = load_profile(path).check
    assert check.threshold.achieved.mean == pytest.approx(0.5, abs=0.1)
    assert check.uniform == check.exact


def test_plan_solves_again_without_the_model(tiny_profile, tmp_path):
    path = tmp_path / "quarter.json"
    result = run("plan", tiny_profile, "--budget", "0.25", "-o", path, "--json")
    assert result.exit_code == 0, result.output
    profile = load_profile(path)
    assert json.loads(result.stdout)["plan"]["budget"] == profile.plan.budget == 0.25
    assert profile.plan.predicted_ratio == pytest.approx(0.25, abs=1e-6)
    assert profile.check is None
    # The arrays came along, so that the copy can be planned and drawn again.
    assert run("plan", path, "--budget", "0.75", "-o", tmp_path / "most.json").exit_code == 0


def test_show_validate_and_report(tiny_profile, tiny_folder, tmp_path):
    shown = run("show", tiny_profile)
    assert shown.exit_code == 0
    assert "budget 0.5" in shown.stdout
    assert "KL" in shown.stdout
    assert set(json.loads(run("show", tiny_profile, "--json").stdout)) >= {"model", "plan", "check", "persistence"}
    assert run("validate", tiny_profile, "--model", tiny_folder).exit_code == 0
    page = tmp_path / "tiny.html"
    drawn = run("report", tiny_profile, "-o", page)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stderr == f"Wrote {page}\n"
    assert "<title>tiny: kvprofile report</title>" in page.read_text()


def test_generate_with_and_without_a_profile(tiny_profile, tiny_folder, tiny_text_file):
    prompt = ("--prompt-file", tiny_text_file, "--max-new-tokens", 8, "--json")
    full = json.loads(run("generate", tiny_folder, *prompt).stdout)
    merged = run("generate", tiny_folder, "--profile", tiny_profile, *prompt)
    assert merged.exit_code == 0, merged.output
    merged = json.loads(merged.stdout)
    assert merged["tokens"] == full["tokens"]
    assert merged["slots"] == pytest.approx(0.5 * full["tokens"], abs=33)
    assert full["nbytes"] == full["full_nbytes"] == merged["full_nbytes"]
    assert merged["nbytes"] < 0.6 * full["nbytes"]


def test_models_lists_the_aliases():
    assert "smollm2-135m" in run("models").stdout
    assert {"smollm2-135m", "llama2-7b"} <= {row["name"] for row in json.loads(run("models", "--json").stdout)}


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan"])
def test_a_budget_that_is_no_share(budget, tiny_folder):
    refused(run("calibrate", tiny_folder, f"--budget={budget}"), 2, "budget", "at most 1", "for example 0.5")


def test_a_budget_that_is_no_number(tiny_folder):
    refused(run("calibrate", tiny_folder, "--budget", "half"), 2, "'half'", "--budget")


def test_a_budget_out_of_reach_tells_the_range(tiny_profile, tmp_path):
    result = run("plan", tiny_profile, "--budget", "0.01", "-o", tmp_path / "p.json")
    refused(result, 3, "budget 0.01 is out of reach", "ask for a budget from 0.1")
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_says_how_much_is_missing(tiny_folder, tmp_path):
    (tmp_path / "short.txt").write_text("Not much to read here. " * 20)
    result = run("calibrate", tiny_folder, "--data", tmp_path / "short.txt", "-o", tmp_path / "p.json", "--tokens", 256)
    refused(result, 1, "tokens", "missing")
    assert not (tmp_path / "p.json").exists()


def test_a_file_that_is_no_text(tiny_folder, tmp_path):
    (tmp_path / "image.txt").write_bytes(bytes(range(256)) * 20)
    result = run("calibrate", tiny_folder, "--data", tmp_path / "image.txt", "-o", tmp_path / "p.json")
    refused(result, 1, "image.txt", "text")


def test_an_unknown_model_names_the_nearest(tmp_path):
    refused(run("calibrate", "smolm2-135m", "-o", tmp_path / "p.json"), 2, "smollm2-135m", "kvprofile models")


def test_a_profile_of_another_model(tiny_profile, tmp_path):
    other = save_tiny_model(tmp_path / "other", num_key_value_heads=4)
    refused(run("validate", tiny_profile, "--model", other), 3, "kv heads is 2 in the profile and 4 in the model")
    result = run("generate", other, "--profile", tiny_profile, "--prompt", "Once upon a time")
    refused(result, 3, "does not fit this model", "calibrate this model")


def _truncated(text):
    return text[: len(text) // 2]


def _newer(text):
    return text.replace('"schema_version": 2', '"schema_version": 3')


def _edited(text):
    return text.replace('"budget": 0.5', '"budget": "half"')


@pytest.mark.parametrize(
    ("damage", "told"),
    [(_truncated, "not a complete JSON file"), (_newer, "schema version 3"), (_edited, "plan.budget")],
)
def test_a_damaged_profile(damage, told, tiny_profile, tiny_folder, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_text(damage(tiny_profile.read_text()))
    for command in (("show", path), ("plan", path, "--budget", "0.5", "-o", tmp_path / "p.json")):
        refused(run(*command), 3, told, "damaged.json")
    if damage is not _edited:  # the runtime reads only what it needs
        result = run("generate", tiny_folder, "--profile", path, "--prompt", "Once")
        assert result.exit_code == 3, result.output


def test_arrays_that_are_missing_or_changed(tiny_profile, tmp_path):
    path = tmp_path / "tiny.json"
    shutil.copy(tiny_profile, path)
    refused(run("plan", path, "--budget", "0.25", "-o", tmp_path / "q.json"), 1, "tiny.safetensors is missing")
    shutil.copy(tiny_profile.with_suffix(".safetensors"), tmp_path)
    with (tmp_path / "tiny.safetensors").open("ab") as file:
        file.write(b"x")
    refused(run("report", path), 1, "SHA-256")


def test_a_place_that_cannot_be_written_is_told_before_the_work(tiny_folder, tmp_path):
    refused(run("calibrate", tiny_folder, "-o", tmp_path / "nowhere" / "p.json"), 1, "nowhere", "cannot write")
    (tmp_path / "p.json").write_text("mine")
    refused(run("calibrate", tiny_folder, "-o", tmp_path / "p.json"), 1, "exists", "--force")
    assert (tmp_path / "p.json").read_text() == "mine"


def test_arrays_of_an_earlier_run_are_found_before_the_work(tiny_folder, tmp_path):
    (tmp_path / "p.safetensors").write_bytes(b"mine")
    refused(run("calibrate", tiny_folder, "-o", tmp_path / "p.json"), 1, "p.safetensors exists", "--force")
    refused(run("calibrate", tiny_folder, "-o", tmp_path / "q.safetensors"), 2, "ends in .json")


def test_threshold_mode_is_refused_where_heads_have_no_threshold(tiny_folder, tiny_text_file, tmp_path):
    path = tmp_path / "p.json"
    size = ("--data", tiny_text_file, "--tokens", 256, "--samples", 2, "--held-out", 0)
    assert run("calibrate", tiny_folder, "--policy", "h2o", "-o", path, *size).exit_code == 0
    result = run("generate", tiny_folder, "--profile", path, "--mode", "threshold", "--prompt", "Once upon a time")
    refused(result, 2, "heads without one", "use exact mode")


def test_no_permission_to_write(tiny_folder, tmp_path, monkeypatch):
    def forbid(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbid)
    refused(run("calibrate", tiny_folder, "-o", tmp_path / "p.json"), 1, "no permission", "another folder")


def test_a_prompt_has_to_be_given_once(tiny_folder):
    refused(run("generate", tiny_folder), 2, "--prompt", "--prompt-file")


def test_ctrl_c_before_the_first_sample_leaves_nothing(tiny_folder, tiny_text_file, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvprofile.models.load.load_model", interrupted)
    result = run("calibrate", tiny_folder, "--data", tiny_text_file, "-o", tmp_path / "p.json")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Nothing was written.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_is_one_line(error, monkeypatch, tiny_folder):
    def lack(*_args, **_options):
        raise error

    monkeypatch.setattr("kvprofile.models.load.load_model", lack)
    result = run("generate", tiny_folder, "--prompt", "Once")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: out of memory; ")
    assert len(result.stderr.splitlines()) == 1
