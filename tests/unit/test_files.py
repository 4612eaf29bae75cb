import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write, cache_dir, sha256_of


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPROFILE_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    assert not cache_dir().exists()
    monkeypatch.setenv("KVPROFILE_CACHE", "~/there")
    assert cache_dir() == Path.home() / "there"


@pytest.mark.parametrize("value", [None, ""])
def test_cache_dir_without_a_choice_is_the_platforms(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("KVPROFILE_CACHE", raising=False)
    else:
        monkeypatch.setenv("KVPROFILE_CACHE", value)
    assert cache_dir().is_absolute()
    assert "kvprofile" in cache_dir().parts


def test_atomic_write_writes_text_as_utf8_and_bytes_as_they_are(tmp_path):
    atomic_write(tmp_path / "text", "naïve\nline\r\n")
    atomic_write(str(tmp_path / "bytes"), b"\x00\xff\r\n")
    assert (tmp_path / "text").read_bytes() == b"na\xc3\xafve\nline\r\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff\r\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_atomic_write_replaces_and_keeps_the_usual_mode(tmp_path):
    target = tmp_path / "profile.json"
    plain = tmp_path / "plain"
    plain.write_text("as any program would write it")
    atomic_write(target, "old")
    atomic_write(target, "new")
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(monkeypatch, tmp_path, failing, failure):
    target = tmp_path / "profile.json"
    target.write_text("old")

    def fail(*_args):
        raise failure

    monkeypatch.setattr(os, failing, fail)
    expected = KVProfileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        atomic_write(target, "new and longer")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert target.read_text() == "old"
    if expected is KVProfileError:
        assert "No space left on device" in str(caught.value)


def test_a_missing_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(KVProfileError, match="is not a folder; make it first") as caught:
        atomic_write(tmp_path / "missing" / "profile.json", "x")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(KVProfileError, match="is not a folder"):
        atomic_write(tmp_path / "file" / "profile.json", "x")


def test_a_folder_in_the_way_is_told(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(KVProfileError, match="cannot write"):
        atomic_write(tmp_path / "taken", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_no_permission_is_told(monkeypatch, tmp_path):
    # Raised by hand: the tests may run as root, whom no mode bits stop.
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KVProfileError, match="no permission in") as caught:
        atomic_write(tmp_path / "profile.json", "x")
    assert isinstance(caught.value.__cause__, PermissionError)
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the test vector of FIPS 180-2
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected
    with pytest.raises(KVProfileError, match="cannot read"):
        sha256_of(tmp_path / "missing")


def test_importing_models_and_resolving_a_name_import_nothing_heavy():
    code = (
        "import sys, kvprofile.files, kvprofile.models.names as m; m.resolve('smollm2-135m'); m.resolve('org/name');"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
