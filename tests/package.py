"""Build the wheel and the source distribution, see that nothing is missing, and try the wheel away from the sources.

`python -m tests.package` (`make package`) works on a copy of what git tracks, in a temporary folder. The environment it tries
the wheel in borrows this one's dependencies. Where twine is installed, it checks both files.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIED = (
    ("--version",),
    ("models", "--json"),
    ("show", "smollm2-135m", "--json"),
    ("plan", "smollm2-135m", "--budget", "0.25", "-o", "quarter.json"),
    ("report", "quarter.json"),
    ("validate", "quarter.json"),
    ("fit", "llama3.1-8b", "--memory", "24GB", "--context", "32k", "--batch", "2"),
)


def wanted(folder: Path) -> set[str]:
    """Every file of the package: what an install has to bring."""
    files = (Path(at) / name for at, _, names in os.walk(folder / "kvprofile", followlinks=True) for name in names)
    return {str(path.relative_to(folder)) for path in files}


def build(folder: Path, into: Path, kind: str) -> Path:
    """Build in a fresh process, as a front end would."""
    script = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return into / done.stdout.split()[-1]


def members(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar if member.isfile()}


def tried(wheel: Path, folder: Path) -> None:
    """Install the wheel alone and run commands in an empty folder."""
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(python), *words], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    assert run("-c", "import kvprofile; print(kvprofile.__file__)").startswith(site)
    for words in TRIED:
        run("-m", "kvprofile", *words)
        print(f"kvprofile {' '.join(words)}: done")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, dist = folder / "source", folder / "dist"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in filter(None, listed.split("\0")):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file, follow_symlinks=False)
        dist.mkdir()
        files = wanted(source)
        archives = [build(source, dist, kind) for kind in ("sdist", "wheel")]
        for archive in archives:
            missing = files - members(archive)
            assert not missing, f"{archive.name} lacks {sorted(missing)}"
            print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB, all {len(files)} files of the package")
        if find_spec("twine"):
            subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, archives)], check=True)
        tried(archives[1], folder)


if __name__ == "__main__":
    main()
