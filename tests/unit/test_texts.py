"""What --data may say: every form read, every mistake answered with one line."""

import csv
import json
import subprocess
import sys
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kvprofile.errors import KVProfileError, UsageError
from kvprofile.samples import load_documents
from kvprofile.samples.builtin import CODE_MODULES, PROSE_MODULES

TEXTS = ["The first text.\nIt has two lines.", 'A second one, with a comma and "quotes".', "Größe 12 µm, naïve café."]


def _texts(documents):
    return [document.text for document in documents]


def _write_table(path, column="text"):
    rows = [{"id": number, column: text} for number, text in enumerate(TEXTS)]
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["id", column])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _refused(kind, *parts, spec, **options):
    with pytest.raises(kind) as caught:
        load_documents(str(spec), **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_importing_brings_in_no_heavy_library():
    heavy = "torch", "transformers", "datasets", "pyarrow", "numpy"
    code = f"import sys, kvprofile.samples; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- built-in ----------------------------------------


@pytest.fixture(scope="module")
def builtin():
    return load_documents()


def test_builtin_has_three_kinds_with_enough_text_each(builtin):
    characters = {}
    for document in builtin:
        characters[document.kind] = characters.get(document.kind, 0) + len(document.text)
    assert characters.keys() == {"prose", "code", "encyclopedia"}
    assert min(characters.values()) > 400_000
    assert len({(document.kind, document.name) for document in builtin}) == len(builtin)


def test_builtin_code_is_python_and_prose_is_not(builtin):
    code = [document for document in builtin if document.kind == "code"]
    for document in code[:10]:
        compile(document.text, document.name, "exec")
    prose = " ".join(document.text for document in builtin if document.kind == "prose")
    assert prose.count("\ndef ") < 20


def test_no_module_gives_both_prose_and_code():
    assert not set(PROSE_MODULES.split()) & set(CODE_MODULES.split())


def test_builtin_prose_repeats_no_long_paragraph(builtin):
    paragraphs = [
        " ".join(paragraph.split())
        for document in builtin
        if document.kind == "prose"
        for paragraph in document.text.split("\n\n")
    ]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 80]
    assert len(long) > 1000
    assert len(set(long)) == len(long)


def test_the_seed_picks_the_entries_and_nothing_else(builtin):
    other = load_documents("builtin", seed=1)
    assert load_documents("builtin", seed=0) == builtin
    assert [d for d in other if d.kind != "encyclopedia"] == [d for d in builtin if d.kind != "encyclopedia"]
    mine, theirs = ({d.text for d in documents if d.kind == "encyclopedia"} for documents in (builtin, other))
    assert not mine & theirs


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    _refused(KVProfileError, "code has 0 characters", "without the sources", "--data", spec="builtin")


# --- files ----------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(("column", "given"), [("text", None), ("context", None), ("body", "body")])
def test_a_table_gives_a_document_a_row(tmp_path, suffix, column, given):
    documents = load_documents(str(_write_table(tmp_path / f"some{suffix}", column)), column=given)
    assert _texts(documents) == TEXTS
    assert {document.kind for document in documents} == {"some"}
    assert documents[1].name == f"some{suffix} row 2"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_missing_column_names_those_there_are(tmp_path, suffix):
    path = _write_table(tmp_path / f"some{suffix}", "body")
    _refused(UsageError, "'text' or 'context'", "id, body", "--column", spec=path)
    _refused(UsageError, "'story'", "id, body", "--column", spec=path, column="story")


def test_a_column_of_numbers_is_refused(tmp_path):
    path = _write_table(tmp_path / "some.jsonl")
    _refused(KVProfileError, "row 1", "holds int", "expected text", spec=path, column="id")


def test_blank_and_repeated_rows_are_passed_over(tmp_path):
    path = tmp_path / "some.jsonl"
    values = ["one", None, "", "  ", "two", "one"]
    path.write_text("\n".join(json.dumps({"text": value}) for value in values))
    assert _texts(load_documents(str(path))) == ["one", "two"]


def test_a_list_of_plain_texts(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(TEXTS))
    assert _texts(load_documents(str(path))) == TEXTS


def test_a_csv_field_may_be_as_long_as_a_book(tmp_path):
    limit = csv.field_size_limit()
    book = "word, " * 100_000
    path = tmp_path / "some.csv"
    path.write_text(f'text\n"{book}"\n')
    assert _texts(load_documents(str(path))) == [book]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', ["line 2", "is no JSON"]),
        ("a.jsonl", b'{"text": "good"}\n[1, 2]\n', ["row 2", "is list", "expected a record"]),
        ("a.json", b'{"text": "not in a list"}', ["holds dict", "expected a list"]),
        ("a.json", b"[]", ["no text"]),
        ("a.csv", b'text,id\n"open', ["is no CSV"]),
        ("a.csv", b"text\nmany, many, fields\n", ["is no CSV", "more fields"]),
        ("a.parquet", b"no parquet at all", ["cannot read", "as parquet"]),
        ("a.txt", b"", ["is empty"]),
        ("a.txt", b" \n\t\n", ["is empty"]),
        ("a.jsonl", b"", ["is empty"]),
        ("a.txt", b"caf\xe9 au lait", ["is no UTF-8 text", "byte 3"]),
        ("a.bin", b"some\0thing", ["is no text", "NUL"]),
        ("a.txt", "sixteen bits".encode("utf-16"), ["is no UTF-8 text"]),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    _refused(KVProfileError, str(path), *parts, spec=path)


@pytest.mark.parametrize("name", ["story.txt", "readme.md", "module.py", "noend"])
def test_any_other_file_is_one_document(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("\ufeffOne.\r\n\r\nTwo ü.\rThree.\n".encode())
    (document,) = load_documents(str(path))
    assert (document.text, document.kind, document.name) == ("One.\n\nTwo ü.\nThree.\n", path.stem, name)


def test_a_folder_gives_its_texts_in_order(tmp_path):
    for name, content in {
        "b.txt": b"loose b",
        "a.md": b"loose a",
        "novels/two.txt": b"second novel",
        "novels/deep/one.txt": b"deep novel",
        "code/run.py": b"print()",
        "code/image.png": b"\x89PNG\0\xff",
        "code/empty.py": b"",
        "table.jsonl": b'{"text": "in a table"}',
        ".hidden.txt": b"hidden",
        ".git/config.txt": b"hidden",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = [(document.name, document.kind, document.text) for document in load_documents(str(tmp_path))]
    assert found == [
        ("a.md", "text", "loose a"),
        ("b.txt", "text", "loose b"),
        ("code/run.py", "code", "print()"),
        ("novels/deep/one.txt", "novels", "deep novel"),
        ("novels/two.txt", "novels", "second novel"),
    ]


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\0\1\2")
    _refused(KVProfileError, str(tmp_path), "no text file", spec=tmp_path)


@pytest.mark.parametrize(
    "spec",
    ["nothere", "no/such.txt", "no/such.jsonl", "./no/such", "../nothere", "/no/such/path", "a/b/c", "", "~/nothere"],
)
def test_a_missing_path_is_a_usage_error(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refused(UsageError, repr(spec), "no such file or folder", "synthwiki:FILE", spec=spec)


# --- SynthWiki and LongBench ----------------------------------------


def test_synthwiki_gives_each_context_once(tmp_path):
    path = tmp_path / "wiki.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["context", "question", "answer"])
        for number in range(4):
            for question in ("who", "where"):
                writer.writerow([f"Context {number}, and so on.", question, "x"])
    documents = load_documents(f"synthwiki:{path}")
    assert _texts(documents) == [f"Context {number}, and so on." for number in range(4)]
    assert {document.kind for document in documents} == {"synthwiki"}


def test_synthwiki_without_its_file(tmp_path):
    for spec in ("synthwiki", "synthwiki:"):
        _refused(UsageError, "synthwiki:FILE", "madlibs1.csv", spec=spec)
    _refused(UsageError, "no such file", spec=f"synthwiki:{tmp_path}/madlibs1.csv")


def _longbench_lines():
    rows = [{"input": "q", "context": text, "answers": ["a"]} for text in [*TEXTS, TEXTS[0]]]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_longbench_from_a_folder(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(_longbench_lines())
    documents = load_documents(f"longbench:qasper:{tmp_path}")
    assert _texts(documents) == TEXTS
    assert {document.kind for document in documents} == {"qasper"}
    _refused(UsageError, "trec.jsonl", spec=f"longbench:trec:{tmp_path}")
    _refused(UsageError, "longbench:TASK", spec="longbench")


def test_longbench_from_the_hub_reads_the_archive(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/qasper.jsonl", _longbench_lines())
        file.writestr("data/trec.jsonl", _longbench_lines())
    asked = []

    def download(*args, **options):
        asked.append((args, options))
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert _texts(load_documents("longbench:qasper")) == TEXTS
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
    _refused(KVProfileError, "no task 'narrative'", "qasper, trec", spec="longbench:narrative")


def test_longbench_without_a_network(monkeypatch):
    def download(*args, **options):
        raise ConnectionError("no route to the hub\nand a second line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    _refused(KVProfileError, "no route to the hub", "longbench:qasper:FOLDER", spec="longbench:qasper")


# --- hub ----------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the network: a dataset of 5,000 rows made by the datasets library itself."""
    asked = []

    def rows():
        for number in range(5000):
            yield {"text": f"row {number}", "title": "t"}

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("spec", "split"), [("hub:org/some", "train"), ("hub:org/some:test[:5%]", "test[:5%]"), ("org/some", "train")]
)
def test_a_hub_dataset_is_streamed_and_bounded(hub, spec, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = load_documents(spec)
    assert hub == [("org/some", {"split": split, "streaming": True})]
    assert _texts(documents) == [f"row {number}" for number in range(2000)]
    assert documents[0].kind == "org/some"


def test_a_hub_dataset_without_the_column(hub):
    _refused(UsageError, "'body'", "text, title", "--column", spec="hub:org/some", column="body")


def test_a_path_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "some").write_text("a local file")
    assert _texts(load_documents("org/some")) == ["a local file"]
    assert hub == []


def test_a_dataset_read_by_the_real_library(tmp_path):
    _write_table(tmp_path / "train.jsonl")
    assert _texts(load_documents(f"hub:{tmp_path}")) == TEXTS
    _refused(KVProfileError, "'nosuch'", "give a local file", spec=f"hub:{tmp_path}:nosuch")


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError, OSError])
def test_a_hub_out_of_reach_is_one_line(monkeypatch, error):
    def load_dataset(name, **options):
        raise error("cannot resolve the host\ntry again")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _refused(KVProfileError, "org/some", "cannot resolve the host", "give a local file", spec="hub:org/some")


def test_hub_without_a_name():
    _refused(UsageError, "hub:ORG/NAME", spec="hub:")
