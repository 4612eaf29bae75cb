"""A cache through any order of what can be done to it, against a plain model of what it must hold, in float64.

The model is a list of token ids for every row, and the keys and values that the stock cache gives them: one layer, so these
depend on nothing that was merged. `KVPROFILE_STATES=2000 pytest tests/unit/test_runtime_states.py` is the long run.
"""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from transformers import DynamicCache

from kvprofile import KVMerger
from kvprofile.errors import KVProfileError
from kvprofile.merging.policies import POLICIES
from kvprofile.profile.fingerprint import model_facts
from kvprofile.runtime.layer import MergedLayer
from tests.unit.budgets import check_budget
from tests.unit.builders import slots_in
from tests.unit.tiny_models import VOCAB, head, profile_values, tiny_model

RUNS = int(os.environ.get("KVPROFILE_STATES", "4"))
LONGEST = 300
HEADS, GROUP = 2, 2
NAMES = ("gauss", "average", "absorb", "h2o", "streaming", "kvmerger", "gather-mended", "zsmerge", "cam", "random")
NONE = ("none", "none")
CODECS = (NONE, NONE, NONE, ("int8", "int4"), ("turbo3", "bfloat16"), ("none", "int6"))
MODEL = tiny_model(num_hidden_layers=1)


def check_output(layer: MergedLayer, call: Any, output: Tensor) -> None:
    """The oldest and newest query of every row get one softmax over the slots of their head and what they see of its tail."""
    query, key, value, found = (part.double().numpy() for part in (call.query, call.key, call.value, output))
    nothing = (key[0, 0, :0], value[0, 0, :0], np.zeros(0))
    slots = [nothing] * (len(layer.state.rows) * HEADS)
    if layer.state.shelves:
        held = slots_in(layer.state)
        pieces = (part.double().split(held.lengths) for part in (held.keys, held.values, held.bias))
        slots = [tuple(part.numpy() for part in parts) for parts in zip(*pieces, strict=True)]
    asked = query.shape[2]
    for place, row in enumerate(layer.state.rows):
        oldest = layer.state.tail.tokens - (layer.state.seen - row.padding - row.merged)
        for number in {0, asked - 1}:
            newest = layer.state.tail.tokens - asked + number
            if newest < oldest:
                continue  # a query that is padding
            for one in range(HEADS):
                keys, values, bias = slots[place * HEADS + one]
                keys = np.concatenate([keys, key[place, one, oldest : newest + 1]])
                values = np.concatenate([values, value[place, one, oldest : newest + 1]])
                own = slice(one * GROUP, (one + 1) * GROUP)
                logits = query[place, own, number] @ keys.T * call.softmax.scaling
                logits[:, : len(bias)] += bias
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                wanted = weights @ values / weights.sum(-1, keepdims=True)
                np.testing.assert_allclose(found[place, number, own], wanted, rtol=1e-3, atol=1e-4)


class CacheMachine(RuleBasedStateMachine):
    """Whatever is done, in whatever order, the cache holds what it should and keeps its budget."""

    def __init__(self) -> None:
        super().__init__()
        self.merger: KVMerger | None = None
        self.draws = torch.Generator().manual_seed(0)
        self.texts: list[list[int]] = []

    @initialize(
        policies=st.lists(st.sampled_from(NAMES), min_size=HEADS, max_size=HEADS),
        shares=st.lists(st.sampled_from([0.02, 0.2, 0.4, 0.65, 1.0]), min_size=HEADS, max_size=HEADS),
        codecs=st.lists(st.sampled_from(CODECS), min_size=HEADS, max_size=HEADS),
        padding=st.lists(st.integers(0, 9), min_size=1, max_size=3),
        tokens=st.integers(10, 150),
    )
    def begin(
        self,
        policies: list[str],
        shares: list[float],
        codecs: list[tuple[str, str]],
        padding: list[int],
        tokens: int,
    ) -> None:
        heads = [
            head(name, epsilon=0.3, share=share, codecs=pair)
            for name, share, pair in zip(policies, shares, codecs, strict=True)
        ]
        self.shares, self.codecs, self.policies = shares, codecs, [POLICIES[name] for name in policies]
        self.plan = profile_values(MODEL, heads)
        self.attach()
        self.padding = [number if len(padding) > 1 else 0 for number in padding]
        self.texts = [[] for _ in padding]
        self.feed(tokens)

    def attach(self) -> None:
        facts = model_facts(MODEL.config)
        means = np.full((facts["layers"], facts["kv_heads"], facts["head_dim"]), 0.1, dtype=np.float32)
        self.merger = KVMerger.from_profile(self.plan, arrays={"key_mean": means}).attach(MODEL)
        self.cache = self.merger.cache()
        self.layer = self.cache.merged[0]

    def run(self, pieces: list[list[int]]) -> None:
        """Read a piece of every row."""
        total = len(self.texts[0]) + len(pieces[0])
        mask = torch.ones(len(pieces), total, dtype=torch.long)
        for place, number in enumerate(self.padding):
            mask[place, :number] = 0
        with torch.no_grad():
            MODEL(torch.tensor(pieces), attention_mask=mask, past_key_values=self.cache)
        self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]

    def drawn(self, tokens: int) -> list[list[int]]:
        return torch.randint(1, VOCAB, (len(self.texts), tokens), generator=self.draws).tolist()

    def has_room(self) -> bool:
        return bool(self.texts) and len(self.texts[0]) < LONGEST

    @precondition(has_room)
    @rule(tokens=st.integers(1, 90))
    def feed(self, tokens: int) -> None:
        self.run(self.drawn(tokens))

    @precondition(has_room)
    @rule(tokens=st.integers(2, 34))
    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self.run(self.drawn(1))

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        removed = int(share * min(self.layer.state.own(row) for row in self.layer.state.rows) * 0.9)
        self.cache.crop(-removed)
        self.texts = [text[: len(text) - removed] for text in self.texts]

    @precondition(has_room)
    @rule(tokens=st.integers(2, 12), share=st.floats(0, 1))
    def draft(self, tokens: int, share: float) -> None:
        self.cache.activate_past_recording()
        self.run(self.drawn(tokens))
        self.cache.crop(-int(share * (tokens - 1)))
        self.texts = [text[: self.cache.get_seq_length()] for text in self.texts]
        self.layer.record_past = False

    @rule(order=st.permutations(range(3)))
    def reorder(self, order: list[int]) -> None:
        rows = [place for place in order if place < len(self.texts)]
        self.cache.reorder_cache(torch.tensor(rows))
        self.take(rows)

    @precondition(lambda self: len(self.texts) < 3)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.take([place for place in range(len(self.texts)) for _ in range(2)])

    @precondition(lambda self: len(self.texts) > 1)
    @rule(left_out=st.integers(0, 3))
    def select(self, left_out: int) -> None:
        rows = [place for place in range(len(self.texts)) if place != left_out % len(self.texts)]
        self.cache.batch_select_indices(torch.tensor(rows))
        self.take(rows)

    def take(self, rows: list[int]) -> None:
        self.texts = [self.texts[place] for place in rows]
        self.padding = [self.padding[place] for place in rows]

    @precondition(has_room)
    @rule()
    def go_on_with_a_copy(self) -> None:
        old, before = self.cache, self.cache.slots()
        self.cache = copy.deepcopy(old)
        self.layer = self.cache.merged[0]
        self.run(self.drawn(3))
        assert old.slots() == before

    def again(self) -> None:
        """Read the whole text once more, into what is empty now."""
        texts, self.texts = self.texts, [[] for _ in self.texts]
        self.run(texts)

    @rule()
    def fail_in_a_forward(self) -> None:
        def failing(*_arguments: Any) -> None:
            raise ZeroDivisionError

        hook = MODEL.model.layers[0].self_attn.register_forward_pre_hook(failing)
        try:
            with pytest.raises(ZeroDivisionError):
                self.run(self.drawn(1))
        finally:
            hook.remove()
        # Nothing was stored yet, so the cache goes on; in the middle of the attention it would not.
        hook = MODEL.model.layers[0].self_attn.o_proj.register_forward_pre_hook(failing)
        try:
            with pytest.raises(ZeroDivisionError):
                self.run(self.drawn(1))
        finally:
            hook.remove()
        self.cache.reset()
        self.again()

    @rule()
    def detach_and_attach(self) -> None:
        assert self.merger is not None
        self.merger.detach()
        with pytest.raises(KVProfileError, match="is not attached"):
            self.run(self.drawn(1))
        self.attach()
        self.again()

    @invariant()
    def holds_what_it_should(self) -> None:
        if not self.texts:
            return
        layer, seen = self.layer, len(self.texts[0])
        assert self.cache.get_seq_length() == seen == layer.state.seen
        check_budget(layer)
        assert [row.padding for row in layer.state.rows] == self.padding or layer.setting.keeps_all
        stock = DynamicCache(config=MODEL.config)
        with torch.no_grad():
            MODEL(torch.tensor(self.texts), past_key_values=stock)
        keys, values = stock.layers[0].keys, stock.layers[0].values
        lengths = layer.state.merged_lengths()
        for place, row in enumerate(layer.state.rows):
            own = seen - row.padding - row.merged
            assert own >= min(32, seen - row.padding) - 32 * bool(row.merged)
            for part, held in ((keys, layer.keys), (values, layer.values)):
                torch.testing.assert_close(
                    held[place, :, held.shape[2] - own :], part[place, :, seen - own :], rtol=1e-4, atol=1e-5
                )
            stored = lengths[place * HEADS : (place + 1) * HEADS]
            assert self.cache.slots()[0][place] == [own + number for number in stored]
        if layer.state.shelves:
            self.counts(lengths)

    def counts(self, lengths: list[int]) -> None:
        """No slot stands for tokens that were not there; where nothing was dropped, all of them are stood for."""
        held = slots_in(self.layer.state)
        for place, biases in enumerate(held.bias.split(lengths)):
            policy, row = self.policies[place % HEADS], self.layer.state.rows[place // HEADS]
            if policy.combination.bias != "count" or policy.rule == "drop":
                continue
            stands_for = float(biases.double().exp().sum())
            # The bias of a packed slot has 16 bits.
            off = 1e-2 if self.codecs[place % HEADS] == NONE else 1e-2 + 1e-3 * row.merged
            assert stands_for <= row.merged + off
            if policy.rule == "chain" and self.shares[place % HEADS] >= 0.65:
                assert stands_for == pytest.approx(row.merged, abs=off)

    def teardown(self) -> None:
        if self.merger is not None:
            self.merger.detach()
        assert MODEL.config._attn_implementation == "sdpa"


def test_a_cache_through_any_order_of_things(monkeypatch):
    attended = MergedLayer.attended

    def checked(layer: MergedLayer, call: Any, output: Tensor, tail_mass: Tensor | None) -> None:
        if not layer.setting.keeps_all:  # such layers are stock attention, mask and all
            check_output(layer, call, output)
        attended(layer, call, output, tail_mass)

    monkeypatch.setattr(MergedLayer, "attended", checked)
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=15,
            deadline=None,
            derandomize=RUNS < 100,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )
