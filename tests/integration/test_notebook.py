"""The notebook that needs a model, from top to bottom."""

import pytest

from tests.run_notebooks import FOLDER, execute

pytestmark = pytest.mark.integration


def test_from_calibration_to_generation(smollm2):
    """`smollm2` is asked for so that the model is in the cache before the notebook's own clock runs."""
    notebook = execute(FOLDER / "1-from-calibration-to-generation.ipynb")
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert last.outputs[0].data["text/plain"] == "True"  # detached, the model answers as before
