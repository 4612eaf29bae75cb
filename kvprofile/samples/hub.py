"""Documents from the Hugging Face hub, a bounded number of rows."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kvprofile.errors import KVProfileError
from kvprofile.samples.documents import Document
from kvprofile.samples.files import documents_from_rows, first_line

MAX_ROWS = 2000
"""Rows read of a hub dataset: enough text for any calibration, and the rest is never downloaded."""

LONGBENCH = "THUDM/LongBench"


def hub_documents(name: str, split: str, column: str | None) -> list[Document]:
    """The first rows of a dataset on the hub, streamed.

    Raises:
        UsageError: the dataset has no such column.
        KVProfileError: the hub or the dataset cannot be reached, or it has no such split.
    """
    return documents_from_rows(_rows(name, split), column, name, name)


def longbench_documents(task: str) -> list[Document]:
    """The contexts of one LongBench task, from the archive on the hub.

    The hub's dataset is a loading script, which the datasets library no longer runs; the archive beside it holds
    the same rows as `data/TASK.jsonl`.

    Raises:
        KVProfileError: the hub cannot be reached, or there is no such task.
    """
    return documents_from_rows(longbench_rows(task), "context", task, f"LongBench {task}")


def _rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets

        yield from islice(datasets.load_dataset(name, split=split, streaming=True), MAX_ROWS)
    except Exception as error:  # network, hub, file format: the library lets the errors of a dozen others through
        raise KVProfileError(
            f"cannot read split {split!r} of the hub dataset {name}: {first_line(error)}; give a local file with "
            "--data, or --data builtin, which needs no download"
        ) from error


def longbench_rows(task: str) -> Iterator[dict[str, Any]]:
    """The rows of one LongBench task, from the archive on the hub. Raises KVProfileError as `longbench_documents`."""
    from huggingface_hub import hf_hub_download

    try:
        archive = zipfile.ZipFile(hf_hub_download(LONGBENCH, "data.zip", repo_type="dataset"))
    except Exception as error:  # as above
        raise KVProfileError(
            f"cannot fetch {LONGBENCH} from the hub: {first_line(error)}; download it elsewhere and give "
            f"--data longbench:{task}:FOLDER, where FOLDER holds {task}.jsonl"
        ) from error
    with archive:
        tasks = {
            name.rpartition("/")[2].removesuffix(".jsonl"): name
            for name in archive.namelist()
            if name.endswith(".jsonl")
        }
        if task not in tasks:
            raise KVProfileError(f"LongBench has no task {task!r}; its tasks are {', '.join(sorted(tasks))}")
        with archive.open(tasks[task]) as file:
            yield from (json.loads(line) for line in io.TextIOWrapper(file, encoding="utf-8") if line.strip())
