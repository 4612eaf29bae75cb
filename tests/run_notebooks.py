"""Execute the notebooks and keep their outputs. Run as `python -m tests.run_notebooks [NAME ...]` after changing one."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Run a notebook from its own folder with this Python; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    # Progress bars want widgets, which the notebooks do without; the warning would put a path into the outputs.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()  # when each cell ran is noise
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not of_an_installation(output)]
    return notebook


def of_an_installation(output: nbformat.NotebookNode) -> bool:
    """Whether a library says on stderr what its own installation lacks: that is this machine's, and holds paths."""
    return output.get("name") == "stderr" and "site-packages" in output.text


if __name__ == "__main__":
    for path in [FOLDER / name for name in sys.argv[1:]] or PATHS:
        nbformat.write(execute(path), path)
        print(f"Wrote {path}: {path.stat().st_size / 1024:.0f} KB")
