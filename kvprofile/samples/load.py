"""What `--data` may say, and the documents it stands for."""

from __future__ import annotations

from pathlib import Path

from kvprofile.errors import UsageError
from kvprofile.samples.builtin import builtin_documents
from kvprofile.samples.documents import Document
from kvprofile.samples.files import TABLES, documents_from_rows, read_csv, read_file, read_folder, read_jsonl
from kvprofile.samples.hub import hub_documents, longbench_documents

FORMS = "builtin, a file, a folder, synthwiki:FILE, longbench:TASK[:FOLDER] or hub:ORG/NAME[:SPLIT]"

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", *TABLES)
"""An ORG/NAME that ends so was meant as a path."""


def load_documents(spec: str = "builtin", *, column: str | None = None, seed: int = 0) -> list[Document]:
    """The documents a `--data` value names.

    - `builtin`: prose, code and encyclopedia entries that need no download; the seed picks the entries.
    - a file: .jsonl, .json (a list), .csv and .parquet give one document a row, from `column` (by default `text` or
      `context`); any other UTF-8 file is one document.
    - a folder: all text files below it; the kind of each is its top-level subfolder.
    - `synthwiki:FILE`: the different contexts of a SynthWiki CSV.
    - `longbench:TASK:FOLDER`: the contexts in FOLDER/TASK.jsonl; `longbench:TASK` fetches them from the hub.
    - `hub:ORG/NAME[:SPLIT]`, or an ORG/NAME that is no path: the first rows of a dataset on the hub (split train).

    Raises:
        UsageError: the spec names nothing there is, or a column that is not there.
        KVProfileError: the text is empty, is no text, or cannot be fetched.
    """
    name, _, rest = spec.partition(":")
    if spec == "builtin":
        return builtin_documents(seed)
    if name == "synthwiki":
        return _synthwiki(rest)
    if name == "longbench":
        return _longbench(rest)
    if name == "hub":
        dataset, _, split = rest.partition(":")
        if not dataset:
            raise UsageError("hub needs the name of a dataset: hub:ORG/NAME or hub:ORG/NAME:SPLIT")
        return hub_documents(dataset, split or "train", column)
    if spec:  # an empty path would mean the current folder
        path = Path(spec).expanduser()
        if path.is_dir():
            return read_folder(path)
        if path.exists():
            return read_file(path, column)
    if _is_hub_name(spec):
        return hub_documents(spec, "train", column)
    raise UsageError(f"no such file or folder: {spec!r}; --data takes {FORMS}")


def named_text(text: str) -> tuple[str, str]:
    """The kind (empty where none is given) and the `--data` value of `KIND=TEXT`."""
    kind, named, spec = text.partition("=")
    return (kind, spec) if named and "/" not in kind and ":" not in kind else ("", text)


def check_text(spec: str) -> None:
    """Raise UsageError where a `--data` value names a file or folder that is not there; nothing is read or fetched."""
    name, _, rest = spec.partition(":")
    if name == "synthwiki" and rest:
        _existing(rest)
    known = spec == "builtin" or name in ("synthwiki", "longbench", "hub")
    if not known and not (spec and Path(spec).expanduser().exists()) and not _is_hub_name(spec):
        raise UsageError(f"no such file or folder: {spec!r}; --data takes {FORMS}")


def _is_hub_name(spec: str) -> bool:
    organisation, _, name = spec.partition("/")
    is_path = organisation in ("", ".", "..", "~") or "/" in name or "\\" in spec
    return bool(name) and not is_path and not name.lower().endswith(TEXT_SUFFIXES)


def _synthwiki(file: str) -> list[Document]:
    if not file:
        raise UsageError(
            "synthwiki needs its file, synthwiki:FILE: madlibs1.csv of github.com/adamlerer/synthwiki, "
            "which has no licence to redistribute it under"
        )
    return documents_from_rows(read_csv(_existing(file)), "context", "synthwiki", file)


def _longbench(rest: str) -> list[Document]:
    task, _, folder = rest.partition(":")
    if not task:
        raise UsageError("longbench needs a task: longbench:TASK or longbench:TASK:FOLDER, such as longbench:qasper")
    if not folder:
        return longbench_documents(task)
    path = _existing(str(Path(folder, f"{task}.jsonl")))
    return documents_from_rows(read_jsonl(path), "context", task, str(path))


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"no such file: {name!r}; --data takes {FORMS}")
    return path
