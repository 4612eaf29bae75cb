"""What transformers' own tests ask of a cache and of generation, asked of ours: the table in docs/transformers-contract.md.

`python -m tests.unit.test_transformers_contract` writes the page. The installed package ships none of its tests, so each
question is put again here, with DynamicCache beside it.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from tests.unit.merge_reference import relative_error
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

PATH = Path(__file__).parents[2] / "docs" / "transformers-contract.md"
SHARES = (1.0, 0.5)
TOKENS = 120


class Beside:
    """A model with our caches and the stock one, and a text."""

    def __init__(self, share: float) -> None:
        self.model, self.text = tiny_model(attention="eager"), tiny_text(TOKENS + 40, batch=2)
        self.merger = KVMerger.from_profile(uniform_values(self.model, "absorb", share=share)).attach(self.model)

    def cache(self) -> Cache:
        return self.merger.cache()

    def read(self, cache: Cache, *bounds: int, rows: Any = slice(None)) -> Tensor:
        """Logits of the text from the first bound on, in pieces."""
        pairs = itertools.pairwise(bounds)
        return torch.cat([self.model(self.text[rows, a:b], past_key_values=cache).logits for a, b in pairs], dim=1)

    def make(self, cache: Cache | None, **options: Any) -> Tensor:
        torch.manual_seed(0)
        options = {"do_sample": False, "max_new_tokens": 20, **options}
        text = options.pop("text", self.text[:, :TOKENS])
        options.setdefault("attention_mask", torch.ones_like(text))
        return self.model.generate(text, past_key_values=cache, **options)


def _states(it: Beside) -> bool:
    own, stock = it.cache(), DynamicCache(config=it.model.config)
    names = ("is_compileable", "is_sliding", "is_linear")
    same = len(own) == len(stock) and own.get_max_length() == stock.get_max_length()
    for low, high in ((0, TOKENS), (TOKENS, TOKENS + 1), (TOKENS + 1, TOKENS + 9)):
        same &= own.get_seq_length() == stock.get_seq_length() == low
        it.read(own, low, high)
        it.read(stock, low, high)
        same &= all(getattr(own, name) == getattr(stock, name) for name in names) and own.batch_size == stock.batch_size
        same &= own.get_mask_sizes(3, 0) == stock.get_mask_sizes(3, 0)
        same &= own.get_query_offset() == stock.get_query_offset()
    return same


def _flags(it: Beside) -> bool:
    own, stock = it.cache(), DynamicCache(config=it.model.config)
    for cache in (own, stock):
        it.read(cache, 0, TOKENS)
    return all(getattr(own, name) == getattr(stock, name) for name in ("is_initialized", "is_croppable"))


def _prompt(it: Beside) -> bool:
    return torch.equal(it.read(it.cache(), 0, TOKENS), it.read(DynamicCache(config=it.model.config), 0, TOKENS))


def _shape(it: Beside) -> bool:
    cache = it.cache()
    it.read(cache, 0, TOKENS)
    return cache.layers[0].keys.shape == (2, 2, TOKENS, 16)


def _continued(it: Beside) -> bool:
    pieces = it.read(it.cache(), 0, TOKENS, TOKENS + 10, TOKENS + 11)
    return relative_error(pieces, it.read(it.cache(), 0, TOKENS + 11)) < 1e-5


def _generation(options: dict[str, Any]) -> Callable[[Beside], bool]:
    def as_stock(it: Beside) -> bool:
        return torch.equal(it.make(it.cache(), **options), it.make(DynamicCache(config=it.model.config), **options))

    return as_stock


def _drafted_as_plain(it: Beside) -> bool:
    assistant = tiny_model()  # of the same weights, so that most of its drafts are taken
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    options = {
        "text": it.text[:1, :TOKENS],
        "max_new_tokens": 60,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    drafted = it.make(it.cache(), assistant_model=assistant, **options)
    plain = it.make(it.cache(), **options)
    return relative_error(torch.stack(drafted.logits), torch.stack(plain.logits)) < 1e-4


def _two_turns(it: Beside) -> bool:
    cache = it.cache()
    first = it.make(cache)
    longer = torch.cat([first, it.text[:, TOKENS:]], dim=1)
    second = it.make(cache, text=longer)
    return torch.equal(second[:, : longer.shape[1]], longer) and cache.get_seq_length() == second.shape[1] - 1


def _padded(it: Beside) -> bool:
    text, mask = it.text[:, :TOKENS].clone(), torch.ones(2, TOKENS, dtype=torch.long)
    text[0, :11], mask[0, :11] = 0, 0
    together = it.make(it.cache(), text=text, attention_mask=mask)[:1, TOKENS:]
    return torch.equal(together, it.make(it.cache(), text=text[:1, 11:])[:, TOKENS - 11 :])


def _rows(change: Callable[[Cache], None], rows: list[int]) -> Callable[[Beside], bool]:
    def same(it: Beside) -> bool:
        cache, alone = it.cache(), it.cache()
        it.read(cache, 0, TOKENS)
        it.read(alone, 0, TOKENS, rows=rows)
        change(cache)
        later = it.text[rows, TOKENS:]
        found, expected = (it.model(later, past_key_values=one).logits for one in (cache, alone))
        return relative_error(found, expected) < 1e-5

    return same


def _training(dropout: float) -> Callable[[Beside], bool]:
    def as_in_eval(it: Beside) -> bool:
        it.model.config.layerdrop = dropout  # of a model that has it
        cache, other = it.cache(), it.cache()
        expected = it.read(cache, 0, TOKENS, TOKENS + 9)
        it.model.train()
        return torch.equal(it.read(other, 0, TOKENS, TOKENS + 9), expected)

    return as_in_eval


def _crop(removed: int) -> Callable[[Beside], bool]:
    def as_never_read(it: Beside) -> bool:
        cache, shorter = it.cache(), it.cache()
        it.read(shorter, 0, TOKENS, TOKENS + 20 - removed) if removed < 20 else it.read(
            shorter, 0, TOKENS + 20 - removed
        )
        it.read(cache, 0, TOKENS, TOKENS + 20)
        cache.crop(-removed)
        found, expected = (it.read(one, TOKENS + 20, TOKENS + 30) for one in (cache, shorter))
        return relative_error(found, expected) < 1e-5

    return as_never_read


def _reset(it: Beside) -> bool:
    cache = it.cache()
    first = it.read(cache, 0, TOKENS, TOKENS + 5)
    cache.reset()
    return torch.equal(it.read(cache, 0, TOKENS, TOKENS + 5), first)


def _copied(it: Beside) -> bool:
    cache = it.cache()
    it.read(cache, 0, TOKENS)
    twin = copy.deepcopy(cache)
    return torch.equal(it.read(twin, TOKENS, TOKENS + 5), it.read(cache, TOKENS, TOKENS + 5))


def _weights(it: Beside) -> bool:
    own, stock = (
        it.model(it.text, past_key_values=cache, output_attentions=True).attentions
        for cache in (it.cache(), DynamicCache(config=it.model.config))
    )
    return all(map(torch.equal, own, stock))


def _pickled(it: Beside) -> bool:
    cache = it.cache()
    it.read(cache, 0, TOKENS)
    return pickle.loads(pickle.dumps(cache)).get_seq_length() == TOKENS


def _offloaded(it: Beside) -> bool:
    cache = it.cache()
    it.read(cache, 0, TOKENS)
    cache.offload(0)
    return True


QUESTIONS: dict[str, Callable[[Beside], bool]] = {
    "lengths, offsets and mask sizes are DynamicCache's": _states,
    "`is_initialized` and `is_croppable` are DynamicCache's": _flags,
    "a prompt's logits are the stock cache's, bit for bit": _prompt,
    "`layers[0].keys` is `(batch, kv_heads, tokens, head_dim)`": _shape,
    "text in pieces gets the logits of text in one piece": _continued,
    "greedy: the stock cache's text": _generation({}),
    "sampling: the stock cache's text": _generation({"do_sample": True}),
    "beams: the stock cache's text": _generation({"num_beams": 3}),
    "chunked prefill: the stock cache's text": _generation({"prefill_chunk_size": 48}),
    "assisted: the logits of greedy decoding": _drafted_as_plain,
    "a second turn goes on with the same cache": _two_turns,
    "a row padded on the left gets what it gets alone": _padded,
    "`reorder_cache`": _rows(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "`batch_select_indices`": _rows(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "`batch_repeat_interleave`": _rows(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "`crop` of 7 tokens leaves no trace": _crop(7),
    "`crop` of 60 tokens leaves no trace": _crop(60),
    "`reset`": _reset,
    "`copy.deepcopy`": _copied,
    "`output_attentions`": _weights,
    "`use_cache=False` beside the cache": _generation({"use_cache": False}),
    "`model.train()` without dropout, under `no_grad`: as in eval": _training(0.0),
    "`model.train()` with dropout or layerdrop": _training(0.1),
    "pickling": _pickled,
    "`offload`": _offloaded,
}


@torch.no_grad()
def answer(question: str, share: float) -> str:
    try:
        return "yes" if QUESTIONS[question](Beside(share)) else "no"
    except KVProfileError:
        return "refused"


def page() -> str:
    rows = [f"| {question} | {' | '.join(answer(question, share) for share in SHARES)} |" for question in QUESTIONS]
    return f"""# What holds of transformers' contract for a cache

Made by `tests/unit/test_transformers_contract.py` (`python -m tests.unit.test_transformers_contract` writes this page):
what transformers' tests of caches and of generation ask, asked of a tiny model with transformers' own DynamicCache
beside it. At a budget of 1 nothing is merged; at 0.5 every head keeps half of its slots. *no* means another result,
*refused* an error of one line that says what to do. The ways to generate are in
[architectures.md](architectures.md#ways-to-generate).

| | budget 1 | budget 0.5 |
|---|---|---|
{chr(10).join(rows)}

Below a budget of 1 a *no* is what merging is for: later tokens see slots where the stock cache has tokens, so texts may
differ, and what was read in one piece is attended to before it is merged, what is read in several is not. Single keys
and values are not kept as a tensor of the stock shape. Our layers are made with the first keys, so the cache never says
that it can be initialized early, and it does not promise that any `crop` leaves no trace: while drafts are recorded it
does, otherwise as far as the newest tokens are not merged. In training a merged cache is refused where a gradient would
be needed, and where the model leaves something out at random (dropout of its configuration, of the attention module's
own parts, layerdrop); a model without these gives in training what it gives in eval. At a budget of 1 attention is the
stock one, dropout and all.
"""


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_page_says_what_holds(question):
    found = " | ".join(answer(question, share) for share in SHARES)
    assert f"| {question} | {found} |" in PATH.read_text(encoding="utf-8").splitlines()


def test_the_page_is_the_one_that_is_made():
    text = PATH.read_text(encoding="utf-8")
    assert [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ") and " | " in line][
        1:
    ] == list(QUESTIONS)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    print(f"Wrote {PATH}")
