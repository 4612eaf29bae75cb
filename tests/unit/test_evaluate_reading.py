"""Prompts are cut where they say, and what is read from a cache equals a plain forward and generate."""

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.evaluate.answers import answer
from kvprofile.evaluate.fidelity import fill
from kvprofile.evaluate.prompts import PromptTokens, encode, make_reading, uses_template
from kvprofile.evaluate.tasks import Example
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</{{ message['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
EXAMPLE = Example("Some text: the code is 42. ", "\n\nWhat is the code?", ("42", "forty-two"), prefix="Answer:")


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_the_context_alone_or_all_but_the_last_token_is_compressed(tokenizer):
    after, before = (make_reading(EXAMPLE, tokenizer, question) for question in ("after", "before"))
    prompt = EXAMPLE.context + EXAMPLE.question + EXAMPLE.prefix
    assert text(tokenizer, after.context) == EXAMPLE.context
    assert text(tokenizer, after.question) == EXAMPLE.question + EXAMPLE.prefix
    assert text(tokenizer, before.context) == prompt[:-1]
    assert text(tokenizer, before.question) == prompt[-1:]
    for reading in (after, before):
        assert text(tokenizer, reading.answer) == " 42"


def test_a_chat_template_is_applied_where_there_is_one(tokenizer):
    assert not uses_template(EXAMPLE, tokenizer)
    tokenizer.chat_template = TEMPLATE
    reading = make_reading(EXAMPLE, tokenizer, "after")
    assert text(tokenizer, reading.context) == "<user>" + EXAMPLE.context
    assert text(tokenizer, reading.question) == "\n\nWhat is the code?</user><assistant>\nAnswer:"
    plain = Example(**{**vars(EXAMPLE), "chat": False})
    assert text(tokenizer, make_reading(plain, tokenizer, "after").context) == EXAMPLE.context
    # After a line break no blank comes in front of the answer.
    bare = Example(**{**vars(EXAMPLE), "prefix": ""})
    assert text(tokenizer, make_reading(bare, tokenizer, "after").answer) == "42"


def test_a_template_that_changes_the_message_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(KVProfileError, match="cannot be found"):
        make_reading(EXAMPLE, tokenizer, "after")


def test_the_first_token_is_the_tokenizers_own(tokenizer):
    assert encode(tokenizer, "ab", first=True) == encode(tokenizer, "ab")
    encodings = {"a": [7], "x": [1, 9]}

    class Beginning:
        bos_token_id = 1

        def __call__(self, words, add_special_tokens=True, **_):
            return {"input_ids": [1, 7] if add_special_tokens else encodings[words]}

    assert encode(Beginning(), "a", first=True) == [1, 7]
    assert encode(Beginning(), "a") == [7]


def filled(model, reading):
    return fill(model, DynamicCache(config=model.config), reading.context)


def reading_of(tokens, context=150, question=20, right=6):
    parts = tokens[0].split([context, question, right])
    return PromptTokens(*parts)


def test_the_answer_from_a_full_cache_is_that_of_the_model(tokenizer):
    model = tiny_model(vocab_size=100)  # every token a character
    tokens = tiny_text(176, vocabulary=90)
    reading = reading_of(tokens)
    found = answer(model, tokenizer, filled(model, reading), reading, max_new_tokens=8)
    with torch.no_grad():
        rows = model(tokens).logits[0].log_softmax(-1)
    expected = -rows[169:175].gather(-1, tokens[0, 170:, None]).mean()
    assert found.nll == pytest.approx(float(expected), rel=1e-4)
    generated = model.generate(tokens[:, :170], max_new_tokens=8, do_sample=False)[0, 170:]
    assert found.text == tokenizer.decode(generated).strip("\n")
    assert len(found.text) > 4


def test_an_answer_ends_at_its_stop_and_at_the_end_token(tokenizer):
    model = tiny_model(vocab_size=100)
    reading = reading_of(tiny_text(176, vocabulary=90))

    def write(**options):
        return answer(model, tokenizer, filled(model, reading), reading, max_new_tokens=12, **options).text

    whole = write()
    assert len(whole) > 6
    place = next(place for place in range(3, len(whole)) if whole[place] not in whole[:place])
    assert write(stop=whole[place]) == whole[:place]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(whole[place]), 999]
    assert write() == whole[:place].rstrip()


def test_the_size_is_seen_after_the_context_and_all_is_read_from_a_compressed_cache(tokenizer):
    model = tiny_model()
    reading = reading_of(tiny_text(176, vocabulary=90))
    full = answer(model, tokenizer, filled(model, reading), reading, max_new_tokens=1)
    merger = KVMerger.from_profile(uniform_values(model, "h2o", share=0.4)).attach(model)
    cache = fill(model, merger.cache(), reading.context)
    assert cache.slots() == [[[60, 60]], [[60, 60]]]
    compressed = answer(model, tokenizer, cache, reading, max_new_tokens=1)
    merger.detach()
    assert compressed.nll != pytest.approx(full.nll, rel=1e-3)
