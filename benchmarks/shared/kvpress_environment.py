"""kvpress in a virtual environment of its own: it demands an older transformers than kvprofile does."""

import json
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KVPRESS = "kvpress==0.5.5"


def set_up(folder: Path) -> Path:
    """Make the environment, if it is not there, with the torch that runs here; its Python."""
    import torch

    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        constraint = folder / "constraint.txt"
        # pip's constraints take no local part (+cpu) unless it is given, and then only from where it is found.
        constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
        subprocess.run([python, "-m", "pip", "install", "-q", KVPRESS, "-c", constraint], check=True)
        (folder / "ready").touch()
    return python


def run_inside(folder: Path, script: str, asked: dict[str, Any]) -> Iterator[Any]:
    """Run `script --inside FILE` there, with what is asked in the file; every line it prints, read as JSON, as it comes.

    Raises CalledProcessError where the script fails.
    """
    python = set_up(folder)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "asked.json"
        file.write_text(json.dumps(asked))
        command = [str(python), script, "--inside", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                yield json.loads(line)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
