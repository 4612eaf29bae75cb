"""A few of the faults of `tests/faults.py` that need no long run: a full disk, and a kill at the worst moments of writing."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from kvprofile import load_profile
from tests.unit.conftest import run

resource = pytest.importorskip("resource")

# Killed by nobody's leave: right before the file is flushed, and right before it takes its name.
DYING = """
import os, signal, sys
from kvprofile import files

def die(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, sys.argv[1], die)
files.atomic_write(sys.argv[2], "new and longer")
"""


@contextmanager
def full_disk():
    """No file of this process grows beyond 4,096 bytes.

    Not a fixture: pytest reports a test before it tears fixtures down, and its own output may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "arguments",
    [("plan", "--budget", "0.6", "-o", "out.json"), ("report", "-o", "out.html"), ("validate",)],
    ids=lambda arguments: arguments[0],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(arguments, tiny_profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with full_disk():
        result = run(arguments[0], tiny_profile, *arguments[1:])
    writes = arguments[0] != "validate"
    assert result.exit_code == int(writes), result.output
    if writes:
        assert result.stderr.startswith("Error: cannot write out.")
        assert "File too large; choose another path" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(moment, there, tmp_path):
    path = tmp_path / "profile.json"
    if there:
        path.write_text("old")
    done = subprocess.run([sys.executable, "-c", DYING, moment, str(path)], check=False)
    assert done.returncode < 0
    assert (path.read_text() == "old") if there else not path.exists()
    # What is left bears a name that nothing reads.
    assert all(name.startswith(".profile.json.") for name in os.listdir(tmp_path) if name != "profile.json")


def test_a_profile_whose_arrays_were_replaced_without_it_is_told(tiny_profile, tmp_path):
    """A kill between the two files of `plan --force` leaves new arrays beside the old profile."""
    assert run("plan", tiny_profile, "--budget", "0.6", "-o", tmp_path / "p.json").exit_code == 0
    before = (tmp_path / "p.json").read_bytes()
    (tmp_path / "p.safetensors").write_bytes(b"of the next run")
    result = run("validate", tmp_path / "p.json")
    assert result.exit_code == 1
    assert "SHA-256 differs" in result.stderr
    assert (tmp_path / "p.json").read_bytes() == before
    assert load_profile(tmp_path / "p.json").plan.budget == 0.6
