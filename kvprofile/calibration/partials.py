"""What a calibration has measured, on disk: a folder with one small file for every sample.

A file holds one sample's statistics and, as its metadata, the run it belongs to. So an interrupted run goes on with the
samples that are missing, several processes fill one folder together, and what several machines measured is joined later.
Samples are always folded one by one in the order of their index, whoever measured them: the numbers are those of one process.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write

if TYPE_CHECKING:
    from kvprofile.calibration.measure.statistics import Measurements
    from kvprofile.calibration.runs import Run

FORMAT = 1
_ANEW = "give the same command as before, or leave --resume out and give --force to begin anew"


def partial_path(profile: Path) -> Path:
    """The folder in which the calibration that will write `profile` keeps its samples."""
    return profile.with_suffix(".partial")


def sample_files(folder: Path, indices: Iterable[int] | None = None) -> list[Path]:
    """The files of the samples of these indices, otherwise of all samples, as far as they are there."""
    if indices is None:
        return sorted(folder.glob("sample-*.safetensors"))
    return [path for path in (_place(folder, index) for index in indices) if path.exists()]


def remove_samples(folder: Path, indices: Iterable[int] | None = None) -> None:
    """Remove the samples of these indices, otherwise all of them, and the folder if nothing is left in it."""
    unfinished = [] if indices is not None else folder.glob(".sample-*.part")  # of processes that were killed
    for file in (*sample_files(folder, indices), *unfinished):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True)
class Partial:
    """The folder of one run: `shards` is the number of shards the samples are split into, 1 if they are not."""

    folder: Path
    run: "Run"
    shards: int = 1

    def done(self) -> set[int]:
        """Indices of the samples that are there.

        Raises KVProfileError if a file is damaged or of another run; the message names what differs.
        """
        found = set()
        for path in sample_files(self.folder):
            there = read_header(path)
            if differs := self.run.difference(there.run):
                name, here, other = differs
                raise KVProfileError(
                    f"{self.folder} belongs to another calibration: its {name} is {other}, this one's is {here}; {_ANEW}"
                )
            found.add(there.index)
        return found

    def save(self, index: int, statistics: "Measurements") -> None:
        """Write what one sample's statistics hold, completely or not at all."""
        from safetensors.numpy import save

        facts = {
            "format": FORMAT,
            "run": self.run.model_dump(mode="json"),
            "sample": index + 1,
            "shards": self.shards,
            "kinds": sorted(statistics.ratios.kinds),
        }
        arrays = {name: _compact(array) for name, array in statistics.state().items()}
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise KVProfileError(
                f"cannot make the folder {self.folder}: {error.strerror or error}; choose another -o"
            ) from error
        atomic_write(_place(self.folder, index), save(arrays, metadata={"kvprofile": json.dumps(facts)}))


@dataclass(frozen=True)
class Header:
    """What a sample's file says of itself; `index` counts from 0."""

    path: Path
    run: "Run"
    index: int
    shards: int
    kinds: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Read a sample's metadata. Raises KVProfileError where the file is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    from kvprofile.calibration.runs import Run

    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["kvprofile"])
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}, expected {FORMAT}")
        run = Run.model_validate(facts["run"])
        index, shards = int(facts["sample"]) - 1, int(facts["shards"])
        if not 0 <= index < run.samples or shards < 1:
            raise ValueError(f"sample {index + 1} of {run.samples}")
        return Header(path, run, index, shards, tuple(map(str, facts["kinds"])))
    except (
        *(SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError),
        KVProfileError,
    ) as error:
        raise KVProfileError(
            f"{path} is damaged or no sample of kvprofile ({_line(error)}); remove it, and measure its sample again with "
            "--resume"
        ) from error


def join(folders: Sequence[Path]) -> tuple["Run", "Measurements"]:
    """Fold the samples of all the folders in the order of their index; returns the run and its statistics.

    Memory is that of two samples' statistics, however many there are. Raises KVProfileError where the folders do not hold
    every sample of one run exactly once.
    """
    headers = [read_header(path) for folder in folders for path in _files_of(folder)]
    first = headers[0]
    ordered: dict[int, Header] = {}
    for header in headers:
        if differs := first.run.difference(header.run):
            name, here, other = differs
            raise KVProfileError(
                f"{header.path} is of another run than {first.path}: its {name} is {other}, the other's is {here}; give "
                "the partials of one run"
            )
        if header.index in ordered:
            raise KVProfileError(
                f"sample {header.index + 1} is there twice, in {ordered[header.index].path} and {header.path}; give every "
                "partial once"
            )
        ordered[header.index] = header
    run, total = first.run, first.run.statistics()
    if missing := [index for index in range(run.samples) if index not in ordered]:
        raise KVProfileError(_what_is_missing(missing, run.samples, max(header.shards for header in headers)))
    for index in range(run.samples):
        total.merge(_load(ordered[index]))
    return run, total


def _files_of(folder: Path) -> list[Path]:
    files = sample_files(folder)
    if not files:
        what = "holds no sample-*.safetensors" if folder.is_dir() else "is no folder"
        raise KVProfileError(f"{folder} {what}; give the .partial folders that calibrate has written")
    return files


def _what_is_missing(missing: list[int], samples: int, shards: int) -> str:
    named = ", ".join(str(index + 1) for index in missing[:8]) + (", ..." if len(missing) > 8 else "")
    what = f"{len(missing)} of {samples} samples are missing: {named}"
    if shards == 1:
        return f"{what}; measure them with the same calibrate command and --resume"
    lacking = sorted({index % shards + 1 for index in missing})
    return f"{what}; give the partial of --shard {', '.join(f'{shard}/{shards}' for shard in lacking)} too"


def _load(header: Header) -> "Measurements":
    """One sample's statistics."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    statistics = header.run.statistics()
    for kind in header.kinds:
        statistics.ratios.of_kind(kind)
    targets = statistics.state()
    try:
        saved = load_file(header.path)
    except (SafetensorError, OSError) as error:
        raise KVProfileError(f"cannot read {header.path} ({_line(error)}); measure its sample again") from error
    if {name: (a.shape, a.dtype.kind) for name, a in saved.items()} != {
        name: (a.shape, a.dtype.kind) for name, a in targets.items()
    }:
        raise KVProfileError(
            f"{header.path} does not hold what its run measures; remove it, and measure its sample again"
        )
    for name, target in targets.items():
        target[...] = saved[name]
    return statistics


def _place(folder: Path, index: int) -> Path:
    return folder / f"sample-{index + 1:05}.safetensors"


def _compact(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The same numbers in half the bytes where they fit without loss: of one sample most are float32, and counts small."""
    narrow = {"float64": np.float32, "int64": np.int32}.get(array.dtype.name)
    if narrow is not None:
        with np.errstate(over="ignore", under="ignore"):
            smaller = array.astype(narrow)
        if np.array_equal(smaller, array):
            return smaller
    return np.ascontiguousarray(array)


def _line(error: Exception) -> str:
    """The first line of what an error says; pydantic's name the field."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0] or type(error).__name__
