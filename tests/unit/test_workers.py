"""Several processes of one run, on a CPU: the bytes of one process, one voice, and no hanging when one of them dies."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvprofile.calibration.partials import partial_path, sample_files
from kvprofile.calibration.workers import ALONE, Workers, announced, idle_gpus
from kvprofile.errors import KVProfileError, UsageError
from tests.unit.conftest import run
from tests.unit.test_cli import refused
from tests.unit.test_shards import SIZE, calibrated, values

DYING = """
import os, signal, sys
from kvprofile.calibration.partials import Partial

save = Partial.save

def save_one(self, index, statistics):
    save(self, index, statistics)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Partial.save = save_one
from kvprofile.cli import main
main(prog_name="kvprofile")
"""


@pytest.fixture(scope="module")
def whole(tiny_folder, tiny_text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "p.json"
    calibrated(tiny_folder, tiny_text_file, output)
    return output


def same(first, second):
    assert values(first) == values(second)
    assert first.with_suffix(".safetensors").read_bytes() == second.with_suffix(".safetensors").read_bytes()


def arguments_of(folder, text, output, *more):
    return [str(part) for part in ("calibrate", folder, "--data", text, "-o", output, *SIZE, *more)]


def test_torchrun_gives_the_bytes_of_one_process(whole, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = arguments_of(tiny_folder, tiny_text_file, output)
    done = subprocess.run(
        [*launcher, "-m", "kvprofile", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    same(whole, output)
    assert sorted(os.listdir(tmp_path)) == ["p.json", "p.safetensors"]
    # One of them speaks.
    for line in ("2 processes share the samples", "Asked to keep 50.0%", f"Wrote {output}\n"):
        assert done.stderr.count(line) == 1


def test_a_rank_that_dies_leaves_its_samples_and_holds_up_nobody(whole, tiny_folder, tiny_text_file, tmp_path):
    output = tmp_path / "p.json"
    arguments = arguments_of(tiny_folder, tiny_text_file, output)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", DYING, *arguments], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    (_, first), _ = (process.communicate(timeout=300) for process in ranks)
    assert [process.returncode for process in ranks] == [1, -signal.SIGKILL]
    (error,) = [line for line in first.splitlines() if line.startswith("Error: ")]
    assert "another process of this run has ended" in error
    assert "--resume" in error
    assert "Traceback" not in first
    # Rank 0 measured samples 1, 3 and 5, rank 1 only its first; nothing is half there.
    assert os.listdir(tmp_path) == ["p.partial"]
    names = [path.name for path in sample_files(partial_path(output))]
    assert names == [f"sample-0000{number}.safetensors" for number in (1, 2, 3, 5)]
    assert sorted(os.listdir(partial_path(output))) == names
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after 4 of 5 samples" in result.stderr
    same(whole, output)


def test_every_item_has_one_owner():
    items = list(range(11))
    shares = [Workers(rank, 4).share(items) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share(items) == items
    assert ALONE.total(np.arange(3.0)).tolist() == [0, 1, 2]


@pytest.fixture
def launched(monkeypatch):
    """Set what a launcher tells its processes."""

    def launch(rank, size, local_rank=None, local_size=None):
        told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        for name, value in told.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return launch


def test_the_launcher_tells_who_one_is(launched):
    launched(None, None)
    assert announced() == ALONE
    launched(5, 8, 1, 4)
    assert announced() == Workers(5, 8, 1, 4)
    launched(0, 1)
    assert announced() == ALONE
    for odd in (("x", 2, 0, 2), (2, 2, 0, 2), (0, 2, 2, 2), (-1, 2, 0, 2)):
        launched(*odd)
        with pytest.raises(UsageError, match=r"the environment has RANK=.*; start with torchrun"):
            announced()


def test_more_ranks_than_samples(launched, tiny_folder, tiny_text_file, tmp_path):
    launched(3, 6, 3, 6)
    result = run(*arguments_of(tiny_folder, tiny_text_file, tmp_path / "p.json"))
    refused(result, 2, "6 processes for 5 samples", "start at most 5")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_every_process_takes_its_own_gpu(eight_gpus):
    assert [Workers(8 + rank, 16, rank, 8).device("auto", None) for rank in (0, 7)] == ["cuda:0", "cuda:7"]
    assert Workers(3, 4, 3, 4).device("cuda", None) == "cuda:3"
    assert Workers(3, 4, 3, 4).device("cpu", None) == "cpu"
    # One process a machine may do with its GPUs what it likes.
    assert Workers(1, 2, 0, 1).device("auto", "auto") == "auto"
    assert ALONE.device("cuda:2", None) == "cuda:2"
    for workers, asked, device_map, told in (
        (Workers(8, 9, 8, 9), "auto", None, "9 processes on this machine, but 8 CUDA devices; start 8"),
        (Workers(1, 2, 1, 2), "cuda:0", None, "would put 2 processes on one GPU"),
        (Workers(1, 2, 1, 2), "auto", "auto", "leave --device-map out"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            workers.device(asked, device_map)
        assert "\n" not in str(caught.value)


def test_idle_gpus_are_told_with_the_command_that_uses_them(eight_gpus, monkeypatch):
    told = idle_gpus(torch.device("cuda", 0), 6)
    assert told.startswith("1 of 8 GPUs works, the others idle")
    assert "torchrun --nproc-per-node 6 -m kvprofile calibrate" in told
    assert idle_gpus(torch.device("cpu"), 6) == ""
    assert idle_gpus(torch.device("cuda", 0), 1) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert idle_gpus(torch.device("cuda", 0), 6) == ""


def test_a_process_that_does_not_answer_is_an_error_of_one_line(monkeypatch):
    def silent(*_args, **_options):
        raise RuntimeError("Timed out waiting 1800000ms\nwith a stack")

    monkeypatch.setattr("torch.distributed.all_reduce", silent)
    with pytest.raises(KVProfileError, match=r"does not answer .Timed out waiting 1800000ms.; ") as caught:
        Workers(0, 2).meet()
    assert "\n" not in str(caught.value)
