"""Files a user brings, texts, tables and GGUF models, damaged at random: read, or refused in one line."""

import json
import re
import struct

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.models.gguf import convert
from kvprofile.samples.files import TABLES, read_file
from tests.fuzzing import EXAMPLES, damaged, fuzzing, outcomes, refusal
from tests.unit.test_models import write_gguf

TEXTS = {
    ".txt": "Grüße, \U0001f600.\r\nA second line.\n".encode(),
    ".json": json.dumps([{"text": "one\u2028two", "context": None}, {"text": "three"}]).encode(),
    ".jsonl": b'{"text": "one", "more": [1, {"a": "\\ud800"}]}\n"two"\n\n{"text": "three"}\n',
    ".csv": b'text,kind\n"one, and\nmore",a\ntwo,b\n',
}


@pytest.fixture(scope="module", autouse=True)
def _told():
    yield
    if EXAMPLES:
        print(dict(sorted(outcomes.items())))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("texts")
    table = folder / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "kind": [1, 2]}), table)
    return folder, {**TEXTS, ".parquet": table.read_bytes()}


@fuzzing(150)
@given(data=st.data())
def test_damaged_texts_are_read_or_refused(data, texts):
    folder, whole = texts
    suffix = data.draw(st.sampled_from(sorted(whole)))
    path = folder / f"damaged{suffix}"
    path.write_bytes(data.draw(damaged(whole[suffix])))
    documents = []
    column = data.draw(st.sampled_from([None, "text", "kind", ""]))
    told = refusal(lambda: documents.extend(read_file(path, column if suffix in TABLES else None)))
    outcomes[f"{suffix} {'read' if told is None else 'refused'}"] += 1
    for document in documents:
        assert document.text.strip()
        document.text.encode()


@pytest.mark.parametrize(("suffix", "text"), [(".json", "[" * 100_000), (".jsonl", '{"text": "\\ud800"}')])
def test_texts_that_cannot_be_written_again(suffix, text, tmp_path):
    path = tmp_path / f"odd{suffix}"
    path.write_text(text)
    assert "odd" in refusal(lambda: read_file(path, None))


def test_a_parquet_file_whose_text_is_no_utf8(texts):
    folder, whole = texts
    path = folder / "latin.parquet"
    path.write_bytes(whole[".parquet"].replace(b"two", b"\x80wo"))
    assert "as parquet" in refusal(lambda: read_file(path, None))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@fuzzing(12)
@given(data=st.data())
def test_damaged_gguf_files_are_converted_or_refused(data, model_file):
    path = model_file.with_name("damaged.gguf")
    path.write_bytes(data.draw(damaged(model_file.read_bytes())))
    told = refusal(lambda: convert(path, model_file.with_name("converted")))
    outcomes[f".gguf {'converted' if told is None else 'refused'}"] += 1


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("embedding_length", 48, "and its header needs"),
        ("embedding_length", 2**20, "weights, more than its .* bytes can hold"),
        ("block_count", 2**31 - 1, "its header says 2147483647 layers"),
        ("feed_forward_length", 80, "and its header needs"),
    ],
)
def test_a_header_that_does_not_fit_the_weights_is_refused(name, value, told, model_file):
    """Before any memory is asked for, where it would be more than the file's weights could fill."""
    data = model_file.read_bytes()
    key = f"llama.{name}".encode() + struct.pack("<I", gguf.GGUFValueType.UINT32)
    at = data.index(key) + len(key)
    path = model_file.with_name("other.gguf")
    path.write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
    message = refusal(lambda: convert(path, model_file.with_name("converted")))
    assert message is not None
    assert re.search(told, message), message
