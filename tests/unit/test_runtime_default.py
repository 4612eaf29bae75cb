"""Generations that were passed no cache get a merged one, and only while they are to."""

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.runtime.cache import MergedCache
from tests.unit.conftest import tiny_tokenizer
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

LONG = {"max_new_tokens": 12, "do_sample": False}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {"assistant_model": tiny_model(seed=1)},
}
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def merger(model):
    return KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)


def generate(model, text, **options):
    torch.manual_seed(0)
    return model.generate(text, attention_mask=torch.ones_like(text), **{**LONG, **options})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_tokens_and_slots_are_those_of_a_cache_passed(model, merger, strategy):
    batch = 1 if strategy in ("prompt lookup", "assisted") else 2
    text, cache = tiny_text(60, batch=batch), merger.cache()
    expected = generate(model, text, past_key_values=cache, **STRATEGIES[strategy])
    with merger.generating():
        found = generate(model, text, **STRATEGIES[strategy])
    assert torch.equal(found, expected)
    assert merger.last_cache.slots() == cache.slots()
    assert max(count for layer in cache.slots() for row in layer for count in row) < cache.get_seq_length()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    model = tiny_model().to(dtype)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model)
    text = tiny_text(40, batch=2)
    expected = generate(model, text, past_key_values=merger.cache())
    with merger.generating():
        assert torch.equal(generate(model, text), expected)


def test_every_generation_gets_a_fresh_cache_and_one_passed_wins(model, merger):
    text = tiny_text(40)
    with merger.generating() as same:
        assert same is merger
        generate(model, text)
        first = merger.last_cache
        generate(model, tiny_text(40, seed=1))
        second = merger.last_cache
        assert first is not second
        assert isinstance(second, MergedCache)
        stock = DynamicCache(config=model.config)
        generate(model, text, past_key_values=stock)
        assert merger.last_cache is second
        assert stock.get_seq_length() == 51


def test_after_the_block_or_an_exception_the_model_is_as_it_was(model, merger):
    before = dict(vars(model))
    with pytest.raises(KVProfileError, match="use_cache=False"), merger.generating():
        generate(model, tiny_text(20), use_cache=False)
    assert vars(model) == before
    with pytest.raises(KVProfileError, match="cache_implementation='static'"), merger.generating():
        generate(model, tiny_text(20), cache_implementation="static")
    assert vars(model) == before
    generate(model, tiny_text(20), use_cache=False)
    assert merger.last_cache is None


def test_by_default_until_detach(model):
    before, text = dict(vars(model)), tiny_text(40)
    stock = generate(model, text)
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model, default=True)
    generate(model, text)
    assert merger.last_cache.get_seq_length() == 51
    merger.detach()
    assert vars(model) == before
    assert merger.last_cache is None
    assert torch.equal(generate(model, text), stock)
    with pytest.raises(KVProfileError, match="not attached"), merger.generating():
        pass


def test_a_block_left_after_detach_leaves_nothing(model):
    before = dict(vars(model))
    merger = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(model, default=True)
    with merger.generating():
        merger.detach()
        assert vars(model) == before
    assert vars(model) == before


def test_the_newest_of_nested_blocks_is_asked_and_they_may_end_in_any_order(model, merger):
    other = KVMerger.from_profile(uniform_values(model, share=0.25)).attach(model)
    outer, inner = merger.generating(), other.generating()
    outer.__enter__()
    inner.__enter__()
    generate(model, tiny_text(40))
    assert other.last_cache is not None
    assert merger.last_cache is None
    outer.__exit__(None, None, None)
    generate(model, tiny_text(40))
    assert merger.last_cache is None
    inner.__exit__(None, None, None)
    other.last_cache = None
    generate(model, tiny_text(40))
    assert other.last_cache is None


def test_a_method_of_the_models_own_is_called_and_comes_back(model, merger):
    called = []

    def own(config, kwargs, *arguments):
        called.append(type(kwargs["past_key_values"]))

    model._prepare_cache_for_generation = own
    with merger.generating():
        generate(model, tiny_text(20))
    assert called == [MergedCache]
    assert model._prepare_cache_for_generation is own


def test_a_copy_of_the_model_starts_without(model, merger):
    text = tiny_text(40)
    with merger.generating():
        other = copy.deepcopy(model)
        found = generate(other, text)
        assert merger.last_cache is None
    merger.detach()
    assert torch.equal(found, generate(model, text))
    its = KVMerger.from_profile(uniform_values(model, share=0.5)).attach(other)
    with its.generating():
        generate(other, text)
    assert its.last_cache is not None


def test_threads_that_generate_and_end_at_the_same_time(model, merger):
    text, before, failed = tiny_text(40), dict(vars(model)), []
    expected = model.generate(text, past_key_values=merger.cache(), **LONG)

    def work() -> None:
        for _ in range(3):
            with merger.generating():
                if not torch.equal(model.generate(text, **LONG), expected):
                    failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert vars(model) == before


@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_of_peft_around_the_model(model, inside):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    text, values = tiny_text(40), uniform_values(model, share=0.5)
    plain = generate(model, text)
    adapted = peft.get_peft_model(model, config).eval()
    before = dict(vars(model))
    merger = KVMerger.from_profile(values).attach(model if inside else adapted)
    cache = merger.cache()
    expected = adapted.generate(input_ids=text, past_key_values=cache, **LONG)
    with merger.generating():
        found = adapted.generate(input_ids=text, **LONG)
    assert torch.equal(found, expected)
    assert merger.last_cache.slots() == cache.slots()
    merger.detach()
    assert vars(model) == before
    assert not torch.equal(adapted.generate(input_ids=text, **LONG), plain)


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = "?unknown", "left", CHAT
    return tokenizer


def story(number: int) -> str:
    return " ".join(f"Sentence {index} tells of {(index + number) * 7919 % 1000} birds." for index in range(3))


def explicit(model, tokenizer, merger, texts: list[str]) -> list[str]:
    """The answers with a cache passed by hand, as one batch."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, past_key_values=merger.cache(), pad_token_id=tokenizer.pad_token_id, **LONG)
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_pipeline_with_text_lists_batches_and_chat(model, tokenizer, merger):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False)
    texts = [story(0), story(1) + " More.", story(2)]
    with merger.generating():
        single = pipe(texts[0], **LONG)[0]["generated_text"]
        listed = [answer[0]["generated_text"] for answer in pipe(texts, **LONG)]
        seen = merger.last_cache.get_seq_length()
        batched = [answer[0]["generated_text"] for answer in pipe(texts, batch_size=3, **LONG)]
        chat = pipe([{"role": "user", "content": texts[0]}], **LONG)[0]["generated_text"]
    one_by_one = [explicit(model, tokenizer, merger, [text])[0] for text in texts]
    assert single == one_by_one[0]
    assert listed == one_by_one
    assert seen == len(texts[2]) + LONG["max_new_tokens"] - 1
    assert batched == explicit(model, tokenizer, merger, texts)
    assert chat == explicit(model, tokenizer, merger, [f"<user>{texts[0]}\n<assistant>"])[0]


def test_a_streamer_in_a_thread(model, tokenizer, merger):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer(story(0), return_tensors="pt", return_token_type_ids=False)
    with merger.generating():
        thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **LONG})
        thread.start()
        answer = "".join(streamer)
        thread.join()
    assert answer == explicit(model, tokenizer, merger, [story(0)])[0]
