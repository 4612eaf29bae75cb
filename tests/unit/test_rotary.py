"""Queries turned on to later positions, against the model that asks them there."""

import pytest
import torch

from kvprofile.calibration.observe import observing
from kvprofile.merging.softmax import Softmax
from kvprofile.merging.tokens import LATER, ROWS_AGAIN, asked_again
from kvprofile.runtime.rotary import rotary_of
from tests.unit.architectures import SUPPORTED, build
from tests.unit.tiny_models import tiny_text

# Learned positions; layers without any; an embedding in complex numbers, or one for several kinds of layers.
NOT_TURNED = {"GPT-2", "OPT", "Cohere 2", "Llama 4", "Gemma 3n"}
LENGTH, BY = 20, 37


def calls_at(model, text, first):
    """The attention of every watched layer, by its index, with the text at the positions from `first` on."""
    found = {}
    with observing(model) as observer, torch.no_grad():
        observer.watch = lambda layer, call, _output: found.setdefault(layer, call)
        places = torch.arange(first, first + len(text))[None]
        model(text[None], position_ids=places, past_key_values=observer.cache, use_cache=True)
    return found


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in NOT_TURNED])
def test_turned_queries_are_those_of_later_positions(name):
    # Where positions are relative a text that begins later is read alike, and only its queries are turned.
    model, text = build(name), tiny_text(LENGTH)[0]
    now, later = (calls_at(model, text, first) for first in (0, BY))
    turned = [layer for layer, call in now.items() if call.rotary is not None]
    assert turned
    for layer in turned:
        found = now[layer].rotary.turned(now[layer].query.float(), torch.full((LENGTH,), BY))
        torch.testing.assert_close(found, later[layer].query, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(NOT_TURNED))
def test_what_cannot_be_turned_is_told(name):
    model, text = build(name), tiny_text(LENGTH)[0]
    assert {call.rotary for call in calls_at(model, text, 0).values()} == {None}
    assert rotary_of(None) is None


def test_queries_asked_again_are_spread_over_the_text_and_end_with_the_newest():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1000, 8, generator=generator)
    keys, values = torch.randn(2, 2, 1000, 8, generator=generator), torch.randn(2, 2, 1000, 5, generator=generator)
    turns = []

    def turn(states, by):
        turns.append((states, by))
        return states + by[:, None]

    found = asked_again(query, keys, values, Softmax(0.5), turn)
    ((states, by),) = turns
    places = 999 + LATER - by
    assert len(places) <= ROWS_AGAIN // 3
    assert places.diff().min() >= 1
    assert places[-(ROWS_AGAIN // 9) :].tolist() == list(range(1000 - ROWS_AGAIN // 9, 1000))
    assert places[0] < 1000 // 50
    assert places.diff().max() <= 1000 // 50
    torch.testing.assert_close(states, query[:, :, places])
    expected = ((query[:, :, places] + by[:, None]) * 0.5).view(2, 2, 3, len(places), 8)
    torch.testing.assert_close(found.states, expected)
    assert found.keys.shape[2] == found.values.shape[2] == 0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_short_text_is_asked_again_whole(count):
    query, keys = torch.randn(1, 300, count, 4), torch.randn(1, 1, count, 4)
    found = asked_again(query, keys, keys, Softmax(1.0), lambda states, by: states + 0 * by[:, None])
    assert 1 <= found.states.shape[3] <= max(3, count)
