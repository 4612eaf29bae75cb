"""What makes the command line pleasant: tables, estimates, the doctor, quiet and verbose runs, completion."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from kvprofile import load_profile
from kvprofile.cli.common import track_of
from kvprofile.doctor import environment as doctor_module
from kvprofile.profile.schema import HeadPlan
from kvprofile.report import terminal
from kvprofile.report.terminal import bar
from tests.unit.builders import build_profile
from tests.unit.conftest import run
from tests.unit.test_cli import refused

SIZE = ("--tokens", 256, "--samples", 2, "--held-out", 1)


def test_show_has_a_row_for_every_layer_and_a_level_for_every_head(tiny_profile, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = run("show", tiny_profile).stdout.splitlines()
    plan = load_profile(tiny_profile).plan
    header = next(index for index, line in enumerate(lines) if line.split()[:3] == ["layer", "slots", "kept"])
    for layer, line in zip(plan.layers, lines[header + 1 :], strict=False):
        cells = line.split()
        assert cells[0] == str(layer.layer)
        assert cells[1] == f"{layer.share:.1%}"
        for head in layer.heads:
            assert f"{head.share:.2f} {head.policy}" in line
    assert "Persistence" in "\n".join(lines)


def test_show_packs_many_heads_into_levels(monkeypatch, capsys):
    """Built in memory: ten heads a layer, from nothing kept to everything kept."""
    monkeypatch.setenv("COLUMNS", "120")
    profile = build_profile()
    shares = [index / 9 for index in range(10)]
    heads = [HeadPlan(policy="gauss", epsilon=None, share=share, damage=None) for share in shares]
    layers = [layer.model_copy(update={"heads": heads}) for layer in profile.plan.layers]
    terminal.show(
        profile.model_copy(
            update={
                "model": profile.model.model_copy(update={"kv_heads": 10, "name": "[odd] name"}),
                "plan": profile.plan.model_copy(update={"layers": layers}),
            }
        )
    )
    told = capsys.readouterr().out
    assert "[odd] name" in told
    assert told.count("▁▁▂▃▄▅▆▇██") == len(layers)
    assert "10 gauss" in told


@pytest.mark.parametrize(("share", "cells"), [(0.0, "▏"), (0.5, "█████"), (1.0, "█" * 10), (0.55, "█████▌")])
def test_a_bar_is_as_long_as_its_share(share, cells):
    assert bar(share, width=10) == cells


def test_quiet_says_nothing_and_verbose_says_more(tiny_folder, tiny_text_file, tmp_path):
    arguments = ("calibrate", tiny_folder, "--data", tiny_text_file, *SIZE)
    quiet = run(*arguments, "-o", tmp_path / "q.json", "-q")
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    assert [line for line in quiet.stderr.splitlines() if not line.startswith("Warning: ")] == []
    usual = run(*arguments, "-o", tmp_path / "u.json")
    loud = run(*arguments, "-o", tmp_path / "v.json", "-v")
    assert usual.stderr.splitlines()[-1] == f"Wrote {tmp_path / 'u.safetensors'}"
    for phrase in ("2 samples of 256 tokens", "peak memory"):
        assert phrase in loud.stderr
        assert phrase not in usual.stderr
    assert "%|" not in usual.stderr  # no bars: stderr is no terminal here
    refused(run(*arguments, "-o", tmp_path / "x.json", "-q", "-v"), 2, "--quiet", "--verbose")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "shown"), [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)]
)
def test_progress_tells_rate_and_remaining_time_on_a_terminal_only(stream, quiet, shown, monkeypatch):
    monkeypatch.setattr("sys.stderr", told := stream())
    assert list(track_of(quiet)([1, 2, 3], "measure")) == [1, 2, 3]
    if shown:
        assert re.search(r"measure: 100%.* 3/3 \[\d\d:\d\d<\d\d:\d\d, .*sample(/s)?", told.getvalue())
    else:
        assert told.getvalue() == ""


def test_calibrate_ends_with_the_verdict(tiny_folder, tiny_text_file, tmp_path):
    result = run("calibrate", tiny_folder, "--data", tiny_text_file, "-o", tmp_path / "p.json", *SIZE)
    check = load_profile(tmp_path / "p.json").check
    assert f"Asked to keep 50.0% of the slots; held-out text keeps {check.exact.achieved.mean:.1%}" in result.stderr
    assert len(result.stderr.splitlines()) <= 10


def test_a_dry_run_tells_tokens_time_and_memory_and_loads_no_weights(tiny_folder, tmp_path, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", tiny_folder, "--dry-run", "--samples", 3, "--held-out", 2, "--tokens", 512)
    assert result.exit_code == 0, result.output
    assert "2,560 tokens" in result.stdout
    assert "about" in result.stdout
    values = json.loads(run("calibrate", tiny_folder, "--dry-run", "--json").stdout)
    assert values["tokens"] == (8 + 6) * 2048
    assert values["memory_total"] == sum(values["memory"].values())
    assert values["seconds"] > 0
    assert os.listdir(tmp_path) == []


def test_validate_with_and_without_a_model(tiny_profile, tiny_folder, tmp_path):
    assert run("validate", tiny_profile).stdout == f"{tiny_profile} is valid\n"
    assert run("validate", tiny_profile, "--model", tiny_folder).stdout.endswith(f"fits {tiny_folder}\n")
    damaged = tmp_path / "p.json"
    damaged.write_text(tiny_profile.read_text().replace('"kv_heads": 2', '"kv_heads": 3'))
    refused(run("validate", damaged), 3, "p.json is not a valid profile")
    damaged.write_text(tiny_profile.read_text())
    refused(run("validate", damaged), 1, "tiny.safetensors is missing")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache of our own."""
    monkeypatch.setattr(doctor_module, "_hub", lambda _timeout: "no (tests do not ask)")
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path / "cache"))


def test_the_doctor_tells_versions_devices_and_caches(offline, tmp_path):
    folder = tmp_path / "cache" / "models" / "some-model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(3 * 2**20))
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    import torch

    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "cpu" in found["devices"]
    assert found["caches"]["converted models"]["models"] == {"some-model": 3 * 2**20}
    assert found["caches"]["converted models"]["size"] == 3 * 2**20
    assert result.exit_code == (1 if found["problems"] else 0)
    text = run("doctor").stdout
    assert "some-model: 3.0 MiB" in text
    assert "hub reachable" in text


def test_the_doctor_finds_problems(offline, tmp_path, monkeypatch):
    (tmp_path / "cache" / "models" / "gone.building").mkdir(parents=True)
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: ["click>=999", "no-such-package-at-all>=1"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = run("doctor")
    assert result.exit_code == 1
    told = " ".join(result.stdout.split())
    assert "kvprofile needs >=999: run pip install 'click>=999'" in told
    assert "no-such-package-at-all is not installed" in told
    assert "gone.building was left by a conversion that was stopped" in told
    assert "no pip" in told


def test_the_doctor_asks_the_hub_for_a_moment_only(monkeypatch):
    class Silent:
        def head(self, _url, *, timeout, **_options):
            asked.append(timeout)
            raise OSError("nobody answers\nsecond line")

    asked: list[float] = []
    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    assert doctor_module._hub(3.0).startswith("no (nobody answers); ")
    assert asked == [3.0]
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert doctor_module._hub(3.0).startswith("not tried: HF_HUB_OFFLINE")
    assert asked == [3.0]


def _complete(words, index):
    environment = {**os.environ, "_KVPROFILE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
    return subprocess.run(
        [sys.executable, "-c", "from kvprofile.cli import main; main(prog_name='kvprofile')"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()


def test_the_shell_completes_commands_flags_and_choices():
    assert _complete("kvprofile cal", 1) == ["plain,calibrate"]
    assert "plain,--resume" in _complete("kvprofile calibrate --res", 2)
    assert _complete("kvprofile calibrate x --mode ex", 4) == ["plain,exact"]
