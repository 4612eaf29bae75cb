"""Profiles on the hub, against a stand-in for it: pushed, fetched, used without a network, refused in one line."""

import io
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from kvprofile import load_profile
from kvprofile.errors import UsageError
from kvprofile.profile.hub import repository
from kvprofile.report.hub_card import card_files


@pytest.fixture(scope="module")
def hub():
    server = subprocess.Popen([sys.executable, "-m", "tests.unit.hub_server"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait()


@pytest.fixture
def kvprofile(hub, tmp_path):
    """Run the command line against the stand-in, in an empty folder with a cache of its own."""

    def run(*words, **environment):
        variables = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_nobody", **environment}
        path = os.pathsep.join([os.getcwd(), *sys.path])
        (tmp_path / "work").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "kvprofile", *map(str, words)],
            cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_profile_travels(kvprofile, hub, tmp_path):
    done = kvprofile("push", "smollm2-135m", "some-one/smollm2-kv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"Wrote {hub}/some-one/smollm2-kv\n"

    done = kvprofile("plan", "hub:some-one/smollm2-kv", "--budget", 0.3, "-o", "p.json")
    assert done.returncode == 0, done.stderr
    planned, own = load_profile(tmp_path / "work" / "p.json"), load_profile("smollm2-135m")
    assert planned.statistics.damage == own.statistics.damage
    assert planned.arrays().keys() == own.arrays().keys()

    # What was fetched is used where there is no network, and the card is not: only what the profile names is fetched.
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = kvprofile("validate", "hub:some-one/smollm2-kv", **offline)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert not list((tmp_path / "home").rglob("README.md"))

    done = kvprofile("push", "smollm2-135m", "some-one/smollm2-kv")
    assert done.returncode == 1
    assert "has a profile.json already; give --force to replace it" in done.stderr
    assert kvprofile("push", "smollm2-135m", "some-one/smollm2-kv", "--force").returncode == 0


@pytest.mark.parametrize(
    ("name", "environment", "code", "told"),
    [
        ("hub:no-one/nothing", {}, 1, "no-one/nothing is not on the hub, or private"),
        ("hub:nothing", {}, 2, "hub:nothing names no repository; expected hub:ORG/NAME"),
        ("hub:no-one/nothing", {"HF_HUB_OFFLINE": "1"}, 1, "no-one/nothing is not in the hub cache"),
        (
            "hub:no-one/nothing",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            1,
            "the hub cannot be reached for no-one/nothing",
        ),
    ],
    ids=["missing", "no name", "offline", "unreachable"],
)
def test_what_cannot_be_fetched_is_one_line(name, environment, code, told, kvprofile):
    done = kvprofile("show", name, **environment)
    assert done.returncode == code
    assert told in done.stderr
    assert "model instead" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_card_shows_the_plan_and_its_bits():
    profile = load_profile("smollm2-135m")
    arrays = profile.arrays()
    slots = card_files(profile, arrays, "some-one/smollm2-kv")
    assert slots.keys() == {"README.md", "slots.png"}
    small = card_files(profile.replan(bytes=0.25), arrays, "some-one/smollm2-kv")
    assert small.keys() == {"README.md", "slots.png", "bits.png"}
    for files in (slots, small):
        text = files.pop("README.md").decode()
        assert re.findall(r"!\[[^]]+\]\((.+)\)", text) == list(files)
        for picture in files.values():
            with Image.open(io.BytesIO(picture)) as image:
                assert image.width > 1000
                assert len(image.convert("RGB").getcolors(1 << 20)) > 30


def test_names():
    assert repository("hub:a/b").location == repository("a/b@v1").location == "a/b"
    assert repository("hub:a/b@v1").revision == "v1"
    for wrong in ("hub:", "hub:a", "hub:a/b/c", "hub:a/b c"):
        with pytest.raises(UsageError):
            repository(wrong)
