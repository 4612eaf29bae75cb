"""One call that generates: raw or in a chat, with a profile or without, on the command line as in Python."""

import json

import pytest
import torch

import kvprofile
from kvprofile.errors import KVProfileError, UsageError
from tests.unit.conftest import run, tiny_tokenizer
from tests.unit.tiny_models import tiny_model, uniform_values

TEXT = " ".join(f"Sentence {index} tells of {index * 7919 % 1000} birds." for index in range(3))
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def talking():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def by_hand(model, profile, text: str) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    merger = kvprofile.KVMerger.from_profile(profile).attach(model)
    options = {"attention_mask": torch.ones_like(ids), "past_key_values": merger.cache(), "do_sample": False}
    output = model.generate(ids, max_new_tokens=12, **options)
    merger.detach()
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


ASKED = f"<user>{TEXT}\n<assistant>"


@pytest.mark.parametrize(("chat", "prompt"), [(None, ASKED), (True, ASKED), (False, TEXT)])
def test_the_template_is_used_where_there_is_one(model, talking, chat, prompt):
    profile, before = uniform_values(model, share=0.5), dict(vars(model))
    found = kvprofile.generate(model, talking, TEXT, profile=profile, max_new_tokens=12, chat=chat)
    assert vars(model) == before
    assert found.tokens == len(prompt) + 11
    assert found.slots < found.tokens
    assert found.text == by_hand(model, profile, prompt)


def test_without_a_template_the_text_is_raw_and_no_profile_is_the_stock_cache(model):
    found = kvprofile.generate(model, tiny_tokenizer(), TEXT, max_new_tokens=12)
    assert found.tokens == found.slots == len(TEXT) + 11
    with pytest.raises(UsageError, match="no chat template"):
        kvprofile.generate(model, tiny_tokenizer(), TEXT, chat=True)
    with pytest.warns(UserWarning, match="model was made for 4,096"):
        kvprofile.generate(model, tiny_tokenizer(), "ab" * 2047, max_new_tokens=3)


@pytest.mark.parametrize("chat", [None, False])
def test_an_empty_text_is_refused_in_a_chat_as_well(model, talking, chat):
    with pytest.raises(KVProfileError, match="the prompt is empty"):
        kvprofile.generate(model, talking, "", chat=chat)


def test_the_command_line(tiny_folder, talking, tmp_path):
    talking.save_pretrained(tmp_path / "chat")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "chat" / file).write_bytes((tiny_folder / file).read_bytes())

    def tokens(folder, *flags) -> int:
        result = run("generate", folder, "--prompt", TEXT, "--max-new-tokens", 4, "--json", *flags)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["tokens"]

    assert tokens(tmp_path / "chat") == tokens(tmp_path / "chat", "--chat") == len(ASKED) + 3
    assert tokens(tmp_path / "chat", "--raw") == tokens(tiny_folder) == len(TEXT) + 3
    refused = run("generate", tiny_folder, "--prompt", TEXT, "--chat")
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr
