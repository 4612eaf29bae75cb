"""Whatever number of threads a program asks for, and however many query heads share a KV head, every policy merges.

Libraries below torch take other routes with more threads and at other sizes: with seven query heads a KV head and
`torch.set_num_threads(2)` the CPU's batched LU failed in the middle of a forward.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kvprofile import KVMerger
from kvprofile.merging.merge import merge_tokens
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.softmax import Softmax
from kvprofile.merging.tokens import Tokens, newest_queries
from tests.unit.builders import random_tokens
from tests.unit.tiny_models import tiny_model, tiny_text, uniform_values

QUERIES = 32  # as many as any policy solves for


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


def asked_by(group: int) -> Tokens:
    """Tokens of two KV heads, and the newest queries of `group` heads each."""
    tokens = random_tokens(0, count=64, newer=QUERIES)
    assert tokens.queries is not None
    query = torch.randn(1, 2 * group, QUERIES, 4, generator=torch.Generator().manual_seed(group))
    states = newest_queries(query, tokens.keys, tokens.values, Softmax(0.6), count=QUERIES).states
    return replace(tokens, queries=replace(tokens.queries, states=states))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group", range(1, 9))
def test_every_policy_with_groups_of_every_size(group, threads):
    torch.set_num_threads(threads)
    tokens = asked_by(group)
    for policy in POLICIES.values():
        slots = merge_tokens(tokens, policy, epsilon=torch.full((2,), 0.5), count=torch.full((1, 2), 32), heavy=2)
        assert slots.lengths == [32, 32]
        assert slots.values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_seven_query_heads_and_two_threads_in_a_model(dtype):
    model = tiny_model(num_hidden_layers=1, num_attention_heads=14, hidden_size=56).to(dtype)
    text = tiny_text(161)
    torch.set_num_threads(2)
    for name in ("gather-mended", "grkv"):
        cache = KVMerger.from_profile(uniform_values(model, name, share=0.5)).attach(model).cache()
        model(text[:, :160], past_key_values=cache, logits_to_keep=1)
        assert cache.slots() == [[[80, 80]]]
        assert model(text[:, 160:], past_key_values=cache).logits.isfinite().all()
