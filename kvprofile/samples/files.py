"""Documents from local files: a text, a table with a column of texts, or a folder of texts."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.samples.documents import Document

COLUMNS = ("text", "context")
"""Where the text is looked for when no column is named."""

CSV_FIELD_LIMIT = 2**31 - 1
"""Characters in one field: the module's own limit of 131,072 is shorter than a book."""


def read_file(path: Path, column: str | None) -> list[Document]:
    """The documents of one file: one for each row of a table (.jsonl, .json, .csv, .parquet), one for any other text.

    Raises:
        UsageError: the table has no such column.
        KVProfileError: the file is empty, is no text, or is not what its suffix says.
    """
    rows = TABLES.get(path.suffix.lower())
    if rows is None:
        return [Document(read_text(path), path.stem, path.name)]
    return documents_from_rows(rows(path), column, path.stem, str(path))


def read_folder(folder: Path) -> list[Document]:
    """Every text file below a folder, in the order of their paths; the kind is the top-level subfolder, else "text".

    Hidden files, tables and whatever is not text are passed over: a folder may well hold images among its texts.

    Raises:
        KVProfileError: there is no text in it.
    """
    documents = []
    for path in sorted(_files(folder), key=lambda path: path.relative_to(folder).parts):
        name = path.relative_to(folder)
        try:
            text = read_text(path)
        except KVProfileError:
            continue
        documents.append(Document(text, name.parts[0] if len(name.parts) > 1 else "text", name.as_posix()))
    if not documents:
        raise KVProfileError(
            f"no text file in the folder {folder}; name a folder of texts, or a table ({', '.join(TABLES)})"
        )
    return documents


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() not in TABLES and path.is_file():
                yield path


def read_text(path: Path) -> str:
    """A file's text with newlines as `\\n`.

    Raises:
        KVProfileError: it is empty, not UTF-8, or holds NUL bytes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise KVProfileError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KVProfileError(
            f"{path} is no UTF-8 text (byte {error.start:,}); give a text file, or convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise KVProfileError(f"{path} is no text: it holds NUL bytes; give a text file, or convert it to UTF-8")
    if not text.strip():
        raise KVProfileError(f"{path} is empty; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def documents_from_rows(rows: Iterable[Any], column: str | None, kind: str, source: str) -> list[Document]:
    """One document for each different text in a column; blank and missing values are passed over.

    Raises:
        UsageError: the rows have no such column; the message names those they have.
        KVProfileError: the column holds something else than text, or no text at all.
    """
    texts: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str) and column is None:
            value: Any = row
        elif isinstance(row, Mapping):
            value = row[_column(row, column, source)]
        else:
            raise KVProfileError(
                f"row {number} of {source} is {type(row).__name__}, expected a record with named columns"
            )
        if value is not None and not isinstance(value, str):
            raise KVProfileError(
                f"row {number} of {source} holds {type(value).__name__}, expected text; choose a --column"
            )
        if value and any("\ud800" <= sign <= "\udfff" for sign in value):  # JSON can name them, no text holds them
            raise KVProfileError(
                f"row {number} of {source} is no text: it holds half a character; mend or remove the row"
            )
        if value and value.strip():
            texts.setdefault(value, number)
    if not texts:
        raise KVProfileError(f"no text in {source}; give one with text in its rows")
    name = Path(source).name
    return [Document(text, kind, f"{name} row {number}") for text, number in texts.items()]


def _column(row: Mapping[str, Any], column: str | None, source: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in row:
            return name
    raise UsageError(
        f"no column {' or '.join(map(repr, wanted))} in {source}: it has {', '.join(map(str, row))}; "
        "choose one with --column"
    )


def read_jsonl(path: Path) -> Iterator[Any]:
    """The value on every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"line {number} of {path}")


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """The rows as records; the first row names the columns."""
    previous = csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        # All rows are read before the limit, which is the process's, is put back.
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise KVProfileError(f"{path} is no CSV: {error}; quote texts that hold commas or newlines") from error
    finally:
        csv.field_size_limit(previous)
    if any(None in row for row in rows):
        raise KVProfileError(f"{path} is no CSV: a row has more fields than the header; quote texts that hold commas")
    yield from rows


def _read_json(path: Path) -> Iterator[Any]:
    values = _parse(read_text(path), str(path))
    if not isinstance(values, list):
        raise KVProfileError(f"{path} holds {type(values).__name__}, expected a list of texts or of records")
    yield from values


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise KVProfileError(f"cannot read {path} as parquet: {first_line(error)}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KVProfileError(f"{where} is no JSON: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


TABLES: Mapping[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
    ".parquet": _read_parquet,
}
