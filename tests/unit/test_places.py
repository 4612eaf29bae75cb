"""Profiles by name: those that come with kvprofile are taken wherever a path is, and come with every install."""

import os
import tomllib
from pathlib import Path, PurePath

import pytest

from kvprofile import KVMerger, load_arrays, load_profile
from kvprofile.cli.report import _page_of
from kvprofile.errors import KVProfileError
from kvprofile.models.names import known_models
from kvprofile.profile.places import locate, shipped
from tests.unit.conftest import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_shipped_profile_is_that_of_its_alias():
    assert set(shipped()) <= {alias.name for alias in known_models()}
    for name, path in shipped().items():
        assert path.read_bytes() == (ROOT / "profiles" / f"{name}.json").read_bytes()
        profile = load_profile(name)
        assert profile.model.name == name
        assert load_arrays(profile, name).keys() == profile.arrays().keys()
        assert KVMerger.from_profile(name).settings.model_name == name


def test_commands_take_a_name():
    assert run("show", "smollm2-135m", "--json").exit_code == 0
    assert run("validate", "gemma3-270m").exit_code == 0
    assert run("plan", "smollm2-135m", "--budget", 0.3, "-o", "p.json").exit_code == 0
    assert run("report", "gemma3-270m").exit_code == 0
    assert sorted(os.listdir()) == ["gemma3-270m.html", "p.json", "p.safetensors"]
    assert load_profile("p.json").plan.budget == 0.3


def test_pages_lie_beside_files_and_here_for_names():
    Path("folder").mkdir()
    Path("folder", "p.json").touch()
    names = {"folder/p.json": "folder/p.html", "smollm2-1.7b": "smollm2-1.7b.html", "hub:a/b-1.7b": "b-1.7b.html"}
    assert {name: str(_page_of(Path(name))) for name in names} == names


def test_a_file_of_that_name_wins():
    Path("smollm2-135m").write_text("{}")
    assert locate("smollm2-135m") == Path("smollm2-135m")
    with pytest.raises(KVProfileError, match="smollm2-135m is not a kvprofile profile"):
        load_profile("smollm2-135m")


def test_an_unknown_name_is_told_those_that_there_are():
    with pytest.raises(
        KVProfileError, match=r"no profile at smollm2; .* come with kvprofile: gemma3-270m, smollm2-135m"
    ):
        load_profile("smollm2")


def test_every_file_of_the_package_is_built_into_it():
    """`python -m tests.package` builds and tries it; this says at once which file would be left out."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for folder, _, names in os.walk(ROOT / "kvprofile", followlinks=True):
        package = ".".join(Path(folder).relative_to(ROOT).parts)
        for name in names:
            if not name.endswith((".py", ".pyc", ".nbi", ".nbc")):  # the last two are numba's, beside Python's own
                assert any(PurePath(name).match(pattern) for pattern in data.get(package, [])), f"{package}: {name}"
