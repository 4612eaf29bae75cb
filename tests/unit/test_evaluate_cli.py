"""`kvprofile evaluate` as a user meets it, on a tiny model and tiny texts."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from kvprofile.evaluate import bench
from kvprofile.evaluate.tasks import TASKS
from tests.unit.conftest import run
from tests.unit.test_cli import refused

SMALL = ("--documents", 2, "--examples", 1, "--tokens", 512, "--policy", "h2o", "--policy", "snapkv")


@pytest.fixture(scope="module")
def command(tiny_folder, tiny_profile, tiny_text_file):
    """The arguments of an evaluation of the tiny model."""
    return ("evaluate", tiny_folder, "--profile", tiny_profile, "--data", f"story={tiny_text_file}", *SMALL)


@pytest.fixture(scope="module")
def outcome(command, tmp_path_factory):
    """One evaluation with a grid; the folder it wrote into and the result of the command."""
    folder = tmp_path_factory.mktemp("evaluation")
    result = run(*command, "--task", "needle", "-o", folder / "e.json")
    assert result.exit_code == 0, result.output
    return folder, result


def test_everything_is_written(outcome):
    folder, result = outcome
    names = {"e.json", "e.md", "e.png", "e-needle.png", "e.rows.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names - {"e.rows.jsonl"}:
        assert f"Wrote {folder / name}" in result.stderr
    for name in ("e.png", "e-needle.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    report = (folder / "e.md").read_text()
    assert result.stdout.strip() in report
    for part in ("Against the full cache", "Against the best rival", "needle, by part", "no chat template"):
        assert part in report
    assert str(folder) not in report


def test_the_result_says_what_was_asked_and_what_was_kept(outcome):
    folder, _ = outcome
    result = json.loads((folder / "e.json").read_text())
    assert [entry["method"] for entry in result["methods"]] == ["full cache", "tiny", "h2o, uniform", "snapkv, uniform"]
    for entry in result["methods"][1:]:
        assert entry["slots_asked"] == 0.5
        assert entry["slots"] == pytest.approx(0.5, abs=0.02)  # a context of 128 tokens has no half without its tail
        assert 0.4 < entry["bytes"] < 0.6
        assert set(entry["measures"]["recall KL"]) >= {"mean", "interval", "against_full", "best_rival"}
    assert result["facts"]["question"] == "after"
    assert result["facts"]["tasks"]["needle"]["prefix"].startswith("The six-digit code of the")
    assert len(result["rows"]) == (2 + 15) * 4
    assert {row["group"] for row in result["rows"] if row["bench"] == "fidelity"} == {"story"}


def test_the_same_command_uses_what_is_finished_and_says_so(outcome, command, tmp_path, monkeypatch):
    folder, first = outcome
    shutil.copy(folder / "e.rows.jsonl", tmp_path / "e.rows.jsonl")
    monkeypatch.setattr(bench, "Filled", lambda *_arguments: None)  # nothing may be measured
    result = run(*command, "--task", "needle", "-o", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert "68 of 68 rows were finished already" in result.stderr
    assert result.stdout == first.stdout
    assert (tmp_path / "e.json").read_text() == (folder / "e.json").read_text()
    refused(run(*command, "-o", tmp_path / "e.json"), 1, "e.json exists", "--force")


def test_budgets_other_profiles_and_the_question_known_before(tiny_folder, tiny_profile, tiny_text_file, tmp_path):
    assert run("plan", tiny_profile, "--budget", 0.3, "-o", tmp_path / "other.json").exit_code == 0
    config = tmp_path / "bench.toml"
    config.write_text(
        f'profile = ["{tiny_profile}", "{tmp_path / "other.json"}"]\nbudget = [0.5, 0.3]\npolicy = ["none"]\n'
        'documents = 0\ntask = ["ruler:multi-key"]\nexamples = 1\ntokens = 512\nquestion = "before"\nseed = 7\n'
    )
    result = run("evaluate", tiny_folder, "--config", config, "-o", tmp_path / "e.json", "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [(entry["method"], entry["slots_asked"]) for entry in shown["methods"]] == [
        ("full cache", 1.0), ("tiny", 0.5), ("other", 0.5), ("tiny", 0.3), ("other", 0.3),
    ]  # fmt: skip
    assert (shown["facts"]["question"], shown["facts"]["seed"]) == ("before", 3)
    # Solved from the same statistics, the two profiles' plans are the same measurement.
    same = shown["methods"][1]["measures"], shown["methods"][2]["measures"]
    assert same[0]["ruler NLL"]["mean"] == same[1]["ruler NLL"]["mean"]
    rows = (tmp_path / "e.rows.jsonl").read_text().splitlines()
    assert len({json.loads(row)["key"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--task", "nothing"), 2, ("unknown task 'nothing'", "encyclopedia, needle")),
        (("--task", "synthwiki:nowhere.csv"), 2, ("no such file", "synthwiki:FILE")),
        (("--documents", 0, "--examples", 0), 2, ("nothing to evaluate",)),
        (("-o", "e.txt"), 2, ("end in .json",)),
        (("--budget", 0.00001), 3, ("out of reach",)),
        (("--config", "nowhere.toml"), 1, ("cannot read nowhere.toml",)),
        (("--config", "{strange}"), 2, ("sets colour", "--help")),
        (("--config", "{scalar}"), 2, ("sets budget to 0.5", "a list")),
        (("--data", "nowhere.txt", "--task", "ruler"), 2, ("no such file or folder",)),
    ],
)
def test_one_line_where_something_is_wrong(arguments, code, parts, command, tmp_path):
    files = {"strange": "colour = 3\n", "scalar": "budget = 0.5\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = {name: tmp_path / name for name in files}
    arguments = [argument.format(**places) if isinstance(argument, str) else argument for argument in arguments]
    output = () if "-o" in arguments else ("-o", tmp_path / "e.json")
    result = run(*command, *output, *arguments)
    refused(result, code, *parts)
    assert not (tmp_path / "e.json").exists()


def test_the_task_of_the_contributors_guide(tiny_folder, tiny_profile, tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = guide[guide.index("## Adding a task") :]
    path = tmp_path / "diary.py"
    path.write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1))
    spec = importlib.util.spec_from_file_location("diary", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(TASKS, "diary", module.DIARY)
    result = run(
        "evaluate", tiny_folder, "--profile", tiny_profile, *SMALL, "--documents", 0, "--task", "diary",
        "-o", tmp_path / "e.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    groups = json.loads((tmp_path / "e.json").read_text())["groups"]
    assert {entry["group"] for entry in groups} == {"first half", "second half"}
    rows = [json.loads(line) for line in (tmp_path / "e.rows.jsonl").read_text().splitlines()]
    assert all(400 < row["tokens"] <= 512 for row in rows)


def test_ctrl_c_keeps_what_is_finished(command, tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvprofile.evaluate.run.run_task", interrupted)
    result = run(*command, "-o", tmp_path / "e.json", "--documents", 1)
    assert result.exit_code == 130
    assert "Finished rows are in" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.rows.jsonl"]
    assert len((tmp_path / "e.rows.jsonl").read_text().splitlines()) == 4


def test_a_plan_for_bytes_is_evaluated_with_its_means(tiny_folder, tiny_profile, tiny_text_file, tmp_path):
    path = tmp_path / "packed.json"
    assert run("plan", tiny_profile, "--bytes", "0.4", "--codec", "int8", "-o", path).exit_code == 0
    size = ("--data", f"story={tiny_text_file}", "--documents", 1, "--tokens", 256, "--policy", "h2o")
    result = run("evaluate", tiny_folder, "--profile", path, *size, "-o", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    entries = {entry["method"]: entry for entry in json.loads((tmp_path / "e.json").read_text())["methods"]}
    # The same slots without codecs, in float32, take more than the packed ones.
    assert entries["packed"]["bytes"] < 0.75 * entries["packed"]["slots"]
    assert entries["h2o, uniform"]["bytes"] > entries["h2o, uniform"]["slots"] - 0.02
    assert "40% of the bytes" in json.loads((tmp_path / "e.json").read_text())["facts"]["profiles"]["packed"]
