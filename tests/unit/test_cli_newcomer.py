"""What a newcomer types first: wrong names are told at once, lists can be asked for, and README's lines work as written."""

import json
import subprocess
import sys

import pytest

from kvprofile import load_profile
from kvprofile.cli.options import CALIBRATED_WITH
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.tasks import TASKS
from kvprofile.files import atomic_write, check_writable
from kvprofile.merging.policies import POLICIES
from kvprofile.models.names import known_models
from kvprofile.names import POLICY_NAMES
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.test_cli_comfort import _complete


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def _without_torch(words):
    """Run the command line in a fresh interpreter; its exit code and stderr, and whether torch or transformers was loaded."""
    script = f"""
import sys
from kvprofile.cli import main
try:
    main({[str(word) for word in words]!r})
except SystemExit as end:
    print(end.code, bool({{"torch", "transformers"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, loaded = result.stdout.split()[-2:]
    return int(code), result.stderr, loaded == "True"


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (("generate", "smolm2-135m", "--prompt", "Once"), 2, "unknown model 'smolm2-135m'"),
        (("generate", "smollm2-135m", "--prompt", ""), 1, "the prompt is empty"),
        (("generate", "smollm2-135m", "--prompt", "Once", "--profile", "none.json"), 1, "no profile at none.json"),
        (("generate", "smollm2-135m", "--prompt", "Once", "--dtype", "float23"), 2, "unknown dtype 'float23'"),
        (("calibrate", "smolm2-135m"), 2, "unknown model 'smolm2-135m'"),
        (("calibrate", "smollm2-135m", "--device", "gpu"), 2, "unknown device 'gpu'"),
        (("calibrate", "smollm2-135m", "--policy", "snapkvv"), 2, "'snapkvv'"),
        (("calibrate", "smollm2-135m", "--probes", "lookup=8"), 2, "--probes has 'lookup=8'"),
        (("calibrate", "smollm2-135m", "--probes", "passages=0,continuation_tokens=0"), 2, "the probe mix is empty"),
        (("evaluate", "smolm2-135m", "--profile", "{profile}"), 2, "unknown model 'smolm2-135m'"),
        (("evaluate", "smollm2-135m", "--profile", "{profile}", "--task", "nothing"), 2, "unknown task 'nothing'"),
        (("evaluate", "smollm2-135m", "--profile", "{profile}", "--data", "none.txt"), 2, "'none.txt'"),
        (("evaluate", "smollm2-135m", "--profile", "none.json"), 1, "no profile at none.json"),
        (("plan", "{profile}", "--policy", "snapkvv", "-o", "p.json"), 2, "unknown policy 'snapkvv'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("elsewhere")
def test_what_cannot_be_meant_is_told_before_torch_is_loaded(command, code, told, tiny_profile):
    found, text, loaded = _without_torch([word.format(profile=tiny_profile) for word in command])
    assert found == code
    assert told in text
    assert not loaded


def test_a_calibration_misses_its_text_before_the_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    refused(run("calibrate", tiny_folder, "--data", "none.txt"), 2, "no such file or folder: 'none.txt'")
    _, text, loaded = _without_torch(["calibrate", tiny_folder, "--data", "none.txt"])
    assert "no such file or folder" in text
    assert not loaded


def test_a_plan_takes_the_profiles_own_budget_and_records_its_command(tiny_profile, tmp_path, monkeypatch):
    path, again = tmp_path / "cake.json", tmp_path / "again.json"
    words = ["plan", str(tiny_profile), "--rule", "cake", "--policy", "snapkv", "-o", str(path)]
    monkeypatch.setattr("sys.argv", ["kvprofile", *words])
    assert run(*words).exit_code == 0
    before, after = load_profile(tiny_profile), load_profile(path)
    assert after.plan.budget == before.plan.budget
    assert after.plan.rule == "cake"
    command = f"kvprofile {' '.join(words)}"
    assert after.created == before.created.model_copy(update={"command": f"{before.created.command} && {command}"})
    monkeypatch.setattr("sys.argv", ["kvprofile", "plan", "again"])
    assert run("plan", path, "--budget", "0.6", "-o", again).exit_code == 0
    assert load_profile(again).created.command == f"{after.created.command} && kvprofile plan again"


def test_an_unknown_policy_names_all_that_work_for_the_profile(tiny_profile, tmp_path):
    result = run("plan", tiny_profile, "--policy", "snapkvv", "-o", tmp_path / "p.json")
    refused(result, 2, "unknown policy 'snapkvv'; expected one of auto, gauss")
    listed = result.stderr.strip().partition("expected one of ")[2].split(", ")
    held = load_profile(tiny_profile).policies
    assert set(listed) == {name for name in POLICY_NAMES if name not in CALIBRATED_WITH or name in held}
    assert set(CALIBRATED_WITH) == {name for name, policy in POLICIES.items() if policy.rule in ("anchor", "complete")}


@pytest.mark.parametrize("budget", ["50%", "50", "50.0", " 50 %"])
def test_percent_are_told_to_be_a_share(budget, tiny_profile, tmp_path):
    result = run("plan", tiny_profile, "--budget", budget, "-o", tmp_path / "p.json")
    refused(result, 2, f"budget {budget.strip()} is not a fraction of slots to keep", "50% is 0.5")


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "p.json", tmp_path / "file" / "p.json", tmp_path / ("long" * 70)):
        for write in (check_writable, lambda place: atomic_write(place, "text")):
            with pytest.raises(KVProfileError, match="cannot write") as caught:
                write(path)
            assert f"cannot write {path}: " in str(caught.value)
            assert ".part" not in str(caught.value)
    check_writable(tmp_path / "p.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_quiet_commands_say_nothing(tiny_profile, tiny_folder, tmp_path):
    for command in (
        ("plan", tiny_profile, "-o", tmp_path / "p.json"),
        ("report", tiny_profile, "-o", tmp_path / "p.html"),
        ("export", tiny_profile, "--to", "kvpress", "-o", tmp_path / "ratios.json"),
    ):
        result = run(*command, "--quiet")
        assert (result.exit_code, result.output) == (0, "")
    result = run("validate", tiny_profile, "--model", tiny_folder, "-q")
    assert (result.exit_code, result.stderr) == (0, "")


def test_models_policies_and_tasks_are_listed_whole_where_there_is_no_terminal():
    text = run("models").stdout
    assert all(f" {alias.where} " in text and alias.note in text for alias in known_models())
    for command, known in (("policies", POLICIES), ("tasks", TASKS)):
        rows = json.loads(run(command, "--json").stdout)
        assert [row[next(iter(row))] for row in rows] == list(known)
        lines = run(command).stdout.splitlines()
        assert [line.split()[0] for line in lines[1:]] == list(known)


def test_the_shell_completes_aliases_and_files():
    found = _complete("kvprofile calibrate smol", 2)
    assert found == ["plain,smollm2-135m", "plain,smollm2-360m", "plain,smollm2-1.7b", "file,smol"]
    assert "plain,llama2-7b" in _complete("kvprofile validate p.json --model llama2", 4)
