"""The blocks of docs/use-it-in.md, run one after the other with a tiny model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import kvprofile
from kvprofile.runtime.cache import MergedCache
from tests.unit.conftest import tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "use-it-in.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def names(tiny_folder, tiny_profile, tmp_path, monkeypatch) -> dict[str, Any]:
    """What stands there after the page's first block and the pipeline's; a profile, and a model under the page's name."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = "?unknown", "left", CHAT
    tokenizer.eos_token = "\x0b"  # the harness needs one
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_profile, "profile.json")
    load = kvprofile.load_model
    monkeypatch.setattr(kvprofile, "load_model", lambda _name: load(str(folder)))
    found: dict[str, Any] = {}
    exec(blocks(PAGE)[0], found)
    return found


def merged(names: dict[str, Any]) -> MergedCache:
    """The last cache handed out, after a look that it merged."""
    cache = names["merger"].last_cache
    assert min(count for layer in cache.slots() for row in layer for count in row) < cache.get_seq_length()
    return cache


def test_every_section_with_code_but_the_harness_runs(names, capsys):
    for title in ("One answer", "A pipeline", "A chat loop", "A streamer"):
        for block in blocks(SECTIONS[title]):
            exec(block, names)
        assert capsys.readouterr().out.strip(), title
        if title != "One answer":
            merged(names)
    assert len(names["many"]) == 2
    assert [message["role"] for message in names["messages"]] == ["user", "assistant"] * 2
    assert names["cache"].get_seq_length() == names["ids"].shape[1] - 1
    exec(blocks(SECTIONS["All that follows"])[0], names)
    assert int(capsys.readouterr().out) == names["inputs"]["input_ids"].shape[1] + 15
    tested = {"One answer", "A pipeline", "A chat loop", "A streamer", "All that follows", "lm-evaluation-harness"}
    assert {title for title, text in SECTIONS.items() if blocks(text)} == tested


def test_lm_evaluation_harness(names):
    lm_eval = pytest.importorskip("lm_eval")
    questions = [{"question": f"{names['text']} Question {number}?", "answer": "x"} for number in range(3)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    names["merger"] = kvprofile.KVMerger.from_profile("profile.json")
    names["merger"].attach(names["model"])
    exec(blocks(SECTIONS["lm-evaluation-harness"])[0], names)
    assert names["results"]["n-samples"]["mine"]["effective"] == 3
    cache = merged(names)
    assert cache.get_seq_length() > len(questions[-1]["question"])
    pair = lm_eval.api.instance.Instance("loglikelihood", {}, (names["text"], "water"), 0)
    expected = names["harness"].loglikelihood([pair])
    with names["merger"].generating():
        assert names["harness"].loglikelihood([pair]) == expected
    assert names["merger"].last_cache is cache
