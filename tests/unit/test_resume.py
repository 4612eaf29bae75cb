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

from kvprofile.calibration import CANDIDATES, measure
from kvprofile.errors import KVProfileError
from kvprofile.models import load_model
from kvprofile.resume import Checkpoint, checkpoint_path, run_facts, samples_done
from kvprofile.samples import load_documents, make_samples
from tests.unit.conftest import run
from tests.unit.test_cli import refused

SIZE = ("--tokens", "256", "--samples", "5", "--held-out", "2", "--dtype", "float32", "--device", "cpu")


def command(folder, text, output, *more):
    return ["calibrate", str(folder), "--data", str(text), "-o", str(output), *SIZE, *more]


def killed_after(samples, arguments, output, how):
    """Run the command line and send it a signal as soon as so many samples are on the disk; returns (code, stderr)."""
    process = subprocess.Popen([sys.executable, "-m", "kvprofile", *arguments], stderr=subprocess.PIPE, text=True)
    partial = checkpoint_path(output)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and samples_done(partial) >= samples:  # written in one step: never half there
            process.send_signal(how)
            break
        time.sleep(0.002)
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
    done = samples_done(checkpoint_path(output))
    assert 2 <= done <= 5
    assert os.listdir(tmp_path) == ["p.partial.safetensors"]

    # Without --resume it is neither taken nor thrown away.
    refused(run(*arguments), 1, "p.partial.safetensors", "--resume", "--force")
    assert samples_done(checkpoint_path(output)) == done

    # Another calibration does not take it.
    refused(run(*arguments, "--resume", "--seed", "1"), 1, "belongs to another calibration: its text is", "--force")
    assert samples_done(checkpoint_path(output)) == done

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
    assert os.listdir(tmp_path) == ["p.partial.safetensors"]
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


def blocks_of(loaded, text, **changes):
    size = {"samples": 4, "tokens": 256, "held_out": 0, "continuation": 64, **changes}
    return make_samples(load_documents(str(text)), loaded.tokenizer, **size)


def measured(loaded, samples, checkpoint=None, seed=0):
    return measure(loaded, samples, "gauss", candidates=CANDIDATES, seed=seed, checkpoint=checkpoint)


class Crash(Exception):
    """Stands for anything that ends a run."""


@pytest.mark.parametrize("after", [1, 3])
def test_every_accumulator_is_taken_up_again(after, loaded, tiny_text_file, tmp_path):
    blocks = blocks_of(loaded, tiny_text_file)
    kept = Checkpoint(tmp_path / "p.partial.safetensors", run_facts(loaded, blocks, seed=0))

    def crashing(items, _label):
        yield from items[:after]
        raise Crash

    with pytest.raises(Crash):
        measure(loaded, blocks.calibration, "gauss", candidates=CANDIDATES, checkpoint=kept, track=crashing)
    assert samples_done(kept.path) == after
    again = measured(loaded, blocks.calibration, kept).finish()
    for name, array in measured(loaded, blocks.calibration).finish().items():
        assert again[name].dtype == array.dtype
        assert again[name].tobytes() == array.tobytes(), name


def test_what_differs_is_named(loaded, tiny_text_file, tmp_path):
    blocks = blocks_of(loaded, tiny_text_file)
    path = tmp_path / "p.partial.safetensors"
    facts = run_facts(loaded, blocks, policy="gauss", seed=0)
    kept = Checkpoint(path, facts)
    measured(loaded, blocks.calibration, kept)
    for name, other in {
        "text": run_facts(loaded, blocks_of(loaded, tiny_text_file, seed=1), policy="gauss", seed=0),
        "seed": run_facts(loaded, blocks, policy="gauss", seed=1),
        "policy": run_facts(loaded, blocks, policy="pivot", seed=0),
        "code": {**facts, "code": "kvprofile 9.9.9 (abc)"},
    }.items():
        with pytest.raises(KVProfileError, match=rf"its {name} is .* --resume out") as caught:
            measured(loaded, blocks.calibration, Checkpoint(path, other))
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
    checkpoint_path(output).write_bytes(b"not this")
    arguments = command(tiny_folder, tiny_text_file, output)
    result = run(*arguments, "--resume")
    refused(result, 1, "damaged or no checkpoint", "--force")
    save_file({"a": np.zeros(3)}, checkpoint_path(output))
    refused(run(*arguments, "--resume"), 1, "damaged or no checkpoint")
    assert list(load_file(checkpoint_path(output))) == ["a"]  # still theirs
    assert run(*arguments, "--force").exit_code == 0
    assert not checkpoint_path(output).exists()
