"""What holds in every test, with tiny models and with real ones."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from kvprofile.runtime.layer import MergedLayer
from tests.unit.budgets import check_budget


@pytest.fixture(autouse=True)
def _every_budget_is_kept(monkeypatch) -> None:
    """Whatever a test does, after every forward every row and head of every merged layer keeps its budget."""
    attended = MergedLayer.attended

    def checked(layer, call, output, tail_mass) -> None:
        attended(layer, call, output, tail_mass)
        if not layer.turns.waiting and not layer.record_past:
            check_budget(layer)

    monkeypatch.setattr(MergedLayer, "attended", checked)
