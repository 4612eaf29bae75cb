"""The notebooks run from top to bottom, and what is committed has their outputs, small and without a path."""

import re

import nbformat
import pytest

from tests.run_notebooks import FOLDER, PATHS, execute

NEEDS_A_MODEL = "1-from-calibration-to-generation.ipynb"  # run by tests/integration
LARGEST = 300 * 1024
A_PATH = re.compile(r"(^|[\s'\"(=])(/(home|root|tmp|usr|opt|work|Users|private|var)/|[A-Z]:\\)")


def text_of(output):
    if output.output_type == "stream":
        return output.text
    return "\n".join(part for kind, part in output.data.items() if kind.startswith("text/"))


def test_there_are_three():
    assert len(PATHS) == 3
    assert (FOLDER / NEEDS_A_MODEL) in PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_outputs_are_there_small_and_tell_no_path(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= len(cells) / 2
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not A_PATH.search(text_of(output))


@pytest.mark.parametrize("path", [path for path in PATHS if path.name != NEEDS_A_MODEL], ids=lambda path: path.stem)
def test_a_notebook_runs_again_with_the_same_numbers(path):
    committed, again = nbformat.read(path, as_version=4), execute(path, timeout=120)

    def told(notebook):
        return [output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]

    assert told(again) == told(committed)


def test_the_path_pattern_finds_paths():
    assert A_PATH.search("Wrote /home/someone/profile.json")
    assert A_PATH.search("open('C:\\Users\\x')")
    assert not A_PATH.search("layers 30 / heads 3, text/html, prose/code")
