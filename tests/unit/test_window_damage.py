"""What codecs do to sliding layers: against attention token by token in float64, each token as generation would find it."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from kvprofile.calibration.measure.codec_damage import WORST
from kvprofile.calibration.measure.window_damage import WindowDamage, window_damage
from kvprofile.calibration.observe import observing
from kvprofile.calibration.probe_mix import KINDS as EVERY_KIND
from kvprofile.calibration.probes import Probe
from kvprofile.calibration.sensitivity import read_probe
from kvprofile.codecs.table import CODECS
from tests.unit.architectures import build
from tests.unit.merge_reference import oldest_visible
from tests.unit.test_damage import exact
from tests.unit.tiny_models import tiny_text
from tests.unit.window_reference import read_back

NAMES, KINDS = ["int8", "int4", "turbo2"], ["recall", "continuation"]
CONTEXT, PROBE = 130, 70
SIZES = dict.fromkeys(("Gemma 2", "Gemma 3", "GPT-OSS"), "sliding_window") | {"Llama 4": "attention_chunk_size"}


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def readings_of(model, window):
    text = tiny_text(CONTEXT + PROBE)[0]
    kind = torch.tensor([EVERY_KIND.index(KINDS[place >= 40]) for place in range(PROBE)])
    found = {}
    with observing(model) as observer:
        read_probe(
            observer,
            Probe(text[:CONTEXT], text[CONTEXT:], kind),
            lambda *_: None,
            lambda *_: None,
            layers=[1],
            seed=0,
            windows={0: window},
            watch_window=found.__setitem__,
        )
    return found


@pytest.mark.parametrize("window", [60, 90, 400])
@pytest.mark.parametrize("name", SIZES)
def test_damage_is_that_of_attention_over_what_generation_finds(name, window):
    model = build(name, **{SIZES[name]: window})
    reading = readings_of(model, window)[0]
    found = window_damage(reading, KINDS, [CODECS[codec] for codec in NAMES])
    assert found.shape == (2, 2, len(NAMES), 2)
    call, sinks = reading.call, reading.call.softmax.sinks
    oldest = oldest_visible(model.config, "chunked_attention" if name == "Llama 4" else "sliding_attention")
    few, first = reading.few.tolist(), CONTEXT - reading.keys.shape[1]
    for head in range(2):
        keys, values = (
            np.concatenate([exact(old[head]), exact(new[0, head])])
            for old, new in ((reading.keys, call.key), (reading.values, call.value))
        )
        for index, codec in enumerate(NAMES):
            coded = np.stack([read_back(codec, key, exact(reading.mean[head, 0])) for key in keys])
            other = np.stack([read_back(codec, value, None) for value in values])
            slopes = np.zeros((2, len(reading.gradients), PROBE))
            for query in range(head * 2, head * 2 + 2):
                for place in few:
                    position = CONTEXT + place
                    seen = np.arange(max(first, oldest(position)), position + 1)
                    old = (seen < position - 32)[:, None]
                    seen = seen - first

                    def output(kept_keys, kept_values, query=query, place=place, seen=seen):
                        logits = kept_keys @ exact(call.query[0, query, place]) * call.softmax.scaling
                        if call.softmax.softcap is not None:
                            logits = np.tanh(logits / call.softmax.softcap) * call.softmax.softcap
                        if sinks is not None:
                            logits = np.append(logits, exact(sinks[query]))
                        return softmax(logits)[: len(seen)] @ kept_values

                    plain = output(keys[seen], values[seen])
                    ways = (
                        (np.where(old, coded[seen], keys[seen]), values[seen]),
                        (
                            keys[seen],
                            np.where(old, other[seen], values[seen]),
                        ),
                    )
                    for part, way in enumerate(ways):
                        change = output(*way) - plain
                        slopes[part, :, place] += exact(reading.gradients[:, place, query]) @ change
            for kind, word in enumerate(KINDS):
                own = [place for place in few if reading.kind[place] == EVERY_KIND.index(word)]
                expected = (slopes[:, :, own] ** 2).mean((1, 2)) / 2
                np.testing.assert_allclose(found[:, head, index, kind], expected, rtol=2e-2, atol=1e-12)


def test_layers_whose_heads_are_others_stay_as_they_are():
    reading = readings_of(build("Gemma 3", sliding_window=60), 60)[0]
    measured = WindowDamage(1, 4, KINDS, NAMES)
    measured.update(0, reading)
    assert (measured.finish()["key_window_damage"] == np.float32(WORST)).all()


def test_samples_are_averaged_and_joined():
    reading = readings_of(build("Gemma 3", sliding_window=60), 60)[0]
    one, two = WindowDamage(1, 2, KINDS, NAMES), WindowDamage(1, 2, KINDS, NAMES)
    one.update(0, reading)
    two.update(0, reading)
    alone = one.finish()
    one.merge(two)
    for name, array in one.finish().items():
        assert array.shape == (1, 2, len(NAMES), 2)
        np.testing.assert_allclose(array, alone[name], rtol=1e-6)
