"""Several processes of one run, one GPU each: who does what, and how they meet.

Processes are started by `torchrun` or `accelerate launch`, which tell each its number in the environment. What they measure
goes through files (`partials.py`); torch.distributed (gloo, on the CPU) only lets them wait for one another and adds up a few
numbers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvprofile.errors import KVProfileError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MEETING = timedelta(minutes=10)  # for all processes to have started
PATIENCE = timedelta(
    hours=6
)  # with one that is alive but silent, as in a long sample; one that died is noticed at once


@dataclass(frozen=True)
class Workers:
    """Where one process stands: number `rank` of `size`, and number `local_rank` of the `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items of one process: every `size`-th."""
        return items[self.rank :: self.size]

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of all processes' `values`, the same in each; every process has to call it.

        Where each number is nonzero in one process at most, it arrives to the bit. Raises KVProfileError if a process has
        ended, or does not come for `PATIENCE`.
        """
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        summed = torch.from_numpy(values.copy())
        try:
            dist.all_reduce(summed, group=self.group)
        except RuntimeError as error:
            raise KVProfileError(
                f"another process of this run has ended or does not answer ({str(error).partition(chr(10))[0]}); its own "
                "message says why, and the same command with --resume goes on with the samples that are done"
            ) from error
        return summed.numpy()

    def meet(self) -> None:
        """Wait until every process is here; the errors are those of `total`."""
        self.total(np.zeros(1))

    def device(self, asked: str, device_map: str | None) -> str:
        """The device this process loads its model on, `asked` being what the user wants: of several GPUs each its own.

        Raises UsageError where processes of one machine would have to share a GPU.
        """
        if self.local_size == 1:
            return asked
        if device_map is not None:
            raise UsageError(
                f"--device-map spreads one model over the GPUs, but {self.local_size} processes on this machine want one "
                "each; leave --device-map out, or start one process a machine"
            )
        if asked.startswith("cuda:"):
            raise UsageError(
                f"--device {asked} would put {self.local_size} processes on one GPU; give --device cuda, and each takes its own"
            )
        import torch

        if asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        if (count := torch.cuda.device_count()) < self.local_size:
            raise UsageError(
                f"{self.local_size} processes on this machine, but {count} CUDA devices; start {count} (torchrun "
                f"--nproc-per-node {count}), or give --device cpu"
            )
        return f"cuda:{self.local_rank}"


ALONE = Workers()


def announced() -> Workers:
    """What the launcher's environment variables say; without a launcher one process. Raises UsageError if they are odd."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    told = {name: os.environ[name] for name in names if name in os.environ}
    try:
        rank, size = int(told["RANK"]), int(told["WORLD_SIZE"])
        local_rank, local_size = int(told.get("LOCAL_RANK", 0)), int(told.get("LOCAL_WORLD_SIZE", 1))
    except ValueError:
        rank = size = local_rank = local_size = -1
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UsageError(
            f"the environment has {' '.join(f'{name}={value}' for name, value in told.items())}, which is no process of a "
            "launcher; start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return Workers(rank, size, local_rank, local_size)


def idle_gpus(device: "torch.device", samples: int) -> str:
    """One line that says how to use the GPUs that a single process on `device` leaves idle; empty if there are none."""
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if min(count, samples) < 2:
        return ""
    return (
        f"1 of {count} GPUs works, the others idle; to share the samples: torchrun --nproc-per-node {min(count, samples)} -m "
        "kvprofile calibrate ..."
    )


@contextmanager
def joined(workers: Workers) -> Iterator[Workers]:
    """Connect the processes while the context lasts. Raises KVProfileError if they do not find one another."""
    if workers.size == 1:
        yield workers
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=MEETING)
        group = dist.new_group(timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise KVProfileError(
            f"process {workers.rank} of {workers.size} cannot reach the others ({str(error).partition(chr(10))[0]}); start "
            "them with torchrun, or measure with --shard and join with kvprofile merge"
        ) from error
    try:
        yield replace(workers, group=group)
    finally:
        dist.destroy_process_group()
