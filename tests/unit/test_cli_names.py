"""The command line's own copies of names agree with the modules they name, and it starts without the heavy imports."""

import json
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

from kvprofile import cli, names
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.cli import options
from kvprofile.merging.policies import POLICIES
from kvprofile.planning import objectives, rules
from kvprofile.profile.schema import Plan

HEAVY = {"torch", "transformers", "datasets", "matplotlib", "pandas", "scipy", "seaborn", "safetensors", "tokenizers"}


def test_every_policy_has_its_name_on_the_command_line():
    assert (names.AUTO, *POLICIES) == names.POLICY_NAMES


def test_every_way_to_spend_a_budget_has_its_flag():
    assert set(rules.PUBLISHED) < set(names.BUDGET_RULES)
    assert tuple(objectives.OBJECTIVES) == names.OBJECTIVES
    for name, (choices, text) in options.PLAN_FLAGS.items():
        assert len(set(choices)) == len(choices)
        assert text.endswith(".")
        # What can be asked for can be written down.
        assert set(get_args(Plan.model_fields[name].annotation)) == set(choices)


def _loaded(code):
    """Run code in a fresh interpreter; returns its output and the top-level packages loaded at its end."""
    script = f"""
import json, sys
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    text, _, names = result.stdout.rstrip().rpartition("\n")
    return text, set(json.loads(names))


def test_importing_the_package_loads_nothing_heavy():
    _, names = _loaded("import kvprofile; kvprofile.__version__")
    assert "kvprofile" in names
    assert not names & (HEAVY | {"numpy", "pydantic", "click"})


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.main.commands)], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments):
    text, names = _loaded(f"from kvprofile.cli import main; main({arguments!r})")
    assert "click" in names
    assert not names & (HEAVY | {"numpy"})
    assert "kvprofile" in text or "Usage:" in text


def test_the_probes_named_in_the_help_are_the_defaults():
    shown = ",".join(f"{field.name}={field.default}" for field in fields(ProbeMix))
    assert shown in str(cli.main.commands["calibrate"].help)


@pytest.mark.parametrize(
    ("command", "spared"),
    [
        (("show",), HEAVY - {"safetensors"}),
        (("plan", "--budget", "0.5", "-o", "planned.json"), HEAVY - {"safetensors"}),
        (("report",), HEAVY - {"safetensors", "matplotlib"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_profile_is_read_planned_and_drawn_without_what_only_measuring_needs(command, spared, tiny_profile, tmp_path):
    name, *rest = command
    words = [name, str(tiny_profile), *(str(tmp_path / word) if word.endswith(".json") else word for word in rest)]
    words += ["-o", str(tmp_path / "page.html")] if name == "report" else []
    _, names = _loaded(f"from kvprofile.cli import main; main({words!r})")
    assert not names & spared
