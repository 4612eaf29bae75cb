"""A calibration that was killed goes on where it was, and ends with the very profile of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.measuring import measure, measure_into
from kvprofile.calibration.partials import Partial, join, partial_path, sample_files
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.run_facts import run_facts
from kvprofile.calibration.runs import run_of
from kvprofile.calibration.tracking import Track
from kvprofile.errors import KVProfileError
from kvprofile.models.load import load_model
from kvprofile.samples import load_documents, make_samples
from tests.unit.conftest import run
from tests.unit.test_cli import refused

SIZE = ("--tokens", "256", "--samples", "5", "--held-out", "2", "--dtype", "float32", "--device", "cpu")


def command(folder, text, output, *more):
    return ["calibrate", str(folder), "--data", str(text), "-o", str(output), *SIZE, *more]


def samples_done(output):
    return len(sample_files(partial_path(output)))  # written in one step: never half there


def killed_after(samples, arguments, output, how):
    """Run the command line and send it a signal as soon as so many samples are on the disk; returns (code, stderr)."""
    process = subprocess.Popen([sys.executable, "-m", "kvprofile", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if samples_done(output) >= samples:
            process.send_signal(how)
            break
        time.sleep(0.01)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


@pytest.fixture(scope="module")
def whole(tiny_folder, tiny_text_file, tmp_path_factory):
    """The profile of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "p.json"
    result = run(*command(tiny_folder, tiny_text_file, output))
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(output.parent)) == ["p.json", "p.safetensors"]
    return output


def same(first, second):
    values = [json.loads(path.read_text()) for path in (first, second)]
    for value in values:
        value.pop("created")
    assert values[0] == values[1]
    texts = [path.read_text().partition('"model"')[2] for path in (first, second)]  # all that follows `created`
    assert texts[0] == texts[1]
    arrays = [path.with_suffix(".safetensors").read_bytes() for path in (first, second)]
    assert arrays[0] == arrays[1]


def test_kill_and_resume_gives_the_same_bytes(whole, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    arguments = command(tiny_folder, tiny_text_file, output)
    code, _ = killed_after(2, arguments, output, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = samples_done(output)
    assert 2 <= done <= 5
    assert os.listdir(tmp_path) == ["p.partial"]

    # Without --resume it is neither taken nor thrown away.
    refused(run(*arguments), 1, "p.partial", "--resume", "--force")
    assert samples_done(output) == done

    # Another calibration does not take it.
    refused(run(*arguments, "--resume", "--seed", "1"), 1, "belongs to another calibration: its text is", "--force")
    assert samples_done(output) == done

    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert f"going on after {done} of 5 samples" in result.stderr
    same(whole, output)
    assert sorted(os.listdir(tmp_path)) == ["p.json", "p.safetensors"]


def test_ctrl_c_tells_how_to_go_on(whole, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    arguments = command(tiny_folder, tiny_text_file, output)
    code, told = killed_after(1, arguments, output, signal.SIGINT)
    assert code == 130, told
    assert "Traceback" not in told
    assert "of 5 samples measured; the same command with --resume goes on from there" in told
    assert os.listdir(tmp_path) == ["p.partial"]
    assert run(*arguments, "--resume").exit_code == 0
    same(whole, output)


def test_resume_with_nothing_there_begins_anew(whole, tiny_folder, tiny_text_file, tmp_path):
    result = run(*command(tiny_folder, tiny_text_file, tmp_path / "p.json", "--resume"))
    assert result.exit_code == 0, result.output
    assert "nothing to resume" in result.stderr
    same(whole, tmp_path / "p.json")


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder), device="cpu", dtype="float32")


CODECS = ("int8", "int4")


def blocks_of(loaded, text, **changes):
    size = {"samples": 4, "tokens": 256, "held_out": 0, "continuation": 64, **changes}
    return make_samples(load_documents(str(text)), loaded.tokenizer, **size)


def run_with(loaded, blocks, **changes):
    asked = {
        "policy": "auto",
        "base": "gauss",
        "candidates": CANDIDATES,
        "codecs": CODECS,
        "mix": ProbeMix(),
        "seed": 0,
    }
    return run_of(loaded, blocks, **{**asked, **changes})


class Crash(Exception):
    """Stands for anything that ends a run."""


class Crashing(Track):
    def __init__(self, after):
        self.after = after

    def __call__(self, items, label):
        yield from items[: self.after]
        raise Crash


@pytest.mark.parametrize("after", [1, 3])
def test_every_accumulator_is_taken_up_again(after, loaded, tiny_text_file, tmp_path):
    blocks = blocks_of(loaded, tiny_text_file)
    kept = Partial(tmp_path / "p.partial", run_with(loaded, blocks))
    with pytest.raises(Crash):
        measure_into(kept, loaded, blocks.calibration, range(4), track=Crashing(after))
    assert kept.done() == set(range(after))
    measure_into(kept, loaded, blocks.calibration, range(4))
    found, again = join([kept.folder])
    assert found == kept.run
    # Neither the files nor the order of the work show: these are the bytes of a run without files.
    plain = measure(loaded, blocks.calibration, "gauss", candidates=CANDIDATES, codecs=CODECS).finish()
    for name, array in again.finish().items():
        assert array.dtype == plain[name].dtype
        assert array.tobytes() == plain[name].tobytes(), name


def test_what_differs_is_named(loaded, tiny_text_file, tmp_path):
    blocks = blocks_of(loaded, tiny_text_file)
    first = run_with(loaded, blocks)
    measure_into(Partial(tmp_path / "p.partial", first), loaded, blocks.calibration, [0])
    newer = first.model_copy(update={"depends": {**first.depends, "code": "kvprofile 9.9.9 (abc)"}})
    for name, other in {
        "text": run_with(loaded, blocks_of(loaded, tiny_text_file, seed=1)),
        "seed": run_with(loaded, blocks, seed=1),
        "policy": run_with(loaded, blocks, base="pivot"),
        "mix": run_with(loaded, blocks, mix=ProbeMix(passages=3)),
        "codecs": run_with(loaded, blocks, codecs=("int8",)),
        "code": newer,
    }.items():
        with pytest.raises(KVProfileError, match=rf"its {name} is .* --resume out") as caught:
            Partial(tmp_path / "p.partial", other).done()
        assert "\n" not in str(caught.value)


def test_one_changed_weight_is_noticed(loaded, tiny_text_file):
    blocks = blocks_of(loaded, tiny_text_file)
    before = run_facts(loaded, blocks)
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        old = weight[5, 7].clone()
        weight[5, 7] = torch.nextafter(old, torch.tensor(9.0))
        after = run_facts(loaded, blocks)
        weight[5, 7] = old
    assert before["weights"] != after["weights"]
    assert run_facts(loaded, blocks) == before


def test_a_damaged_checkpoint_is_refused(tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    folder = partial_path(output)
    folder.mkdir()
    file = folder / "sample-00002.safetensors"
    file.write_bytes(b"not this")
    arguments = command(tiny_folder, tiny_text_file, output)
    refused(run(*arguments, "--resume"), 1, "sample-00002.safetensors is damaged", "--resume")
    save_file({"a": np.zeros(3)}, file)
    refused(run(*arguments, "--resume"), 1, "sample-00002.safetensors is damaged")
    assert list(load_file(file)) == ["a"]  # still theirs
    assert run(*arguments, "--force").exit_code == 0
    assert not folder.exists()
