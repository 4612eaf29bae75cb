from kvprofile import digests
from kvprofile.evaluate.rows import MAKERS, READERS


def test_every_module_that_compresses_or_reads_decides_a_row():
    names = {path.relative_to(digests._ROOT).as_posix() for path in digests.source_files(READERS, MAKERS)}
    for package in ("merging", "runtime"):
        here = {path.relative_to(digests._ROOT).as_posix() for path in (digests._ROOT / package).rglob("*.py")}
        assert all(name.endswith("/__init__.py") for name in here - names), here - names  # these say what is there
    # The file that an explicit list forgot.
    assert {"evaluate/filled.py", "evaluate/bench.py", "evaluate/fidelity.py", "evaluate/answers.py"} <= names
    assert not any(name.startswith(("report/", "cli/", "samples/", "planning/")) for name in names)


def test_imports_are_followed_as_python_follows_them(tmp_path, monkeypatch):
    files = {
        "__init__.py": "",
        "first.py": "import os\nfrom pack import second\nfrom pack.inner.third import name\n",
        "second.py": "def late():\n    from pack import unused\n",
        "unused.py": "",
        "inner/__init__.py": "",
        "inner/third.py": "import pack.fourth\nname = 1\n",
        "fourth.py": "from pack.first import nothing_but_a_name\n",
    }
    root = tmp_path / "pack"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(digests, "_ROOT", root)
    found = [path.relative_to(root).as_posix() for path in digests.source_files(["pack.first"])]
    assert set(found) - {"__init__.py", "inner/__init__.py"} == {"first.py", "fourth.py", "inner/third.py", "second.py"}

    before = digests.code_digest.__wrapped__("pack.first")
    (root / "unused.py").write_text("changed = True")
    assert digests.code_digest.__wrapped__("pack.first") == before
    assert digests.code_digest.__wrapped__("pack.first", but=("pack.fourth",)) != before
    (root / "fourth.py").write_text("changed = True")
    assert digests.code_digest.__wrapped__("pack.first") != before
    without = digests.source_files(["pack.first"], but=("pack.inner",))
    assert root / "inner/third.py" not in without
    assert root / "fourth.py" not in without
