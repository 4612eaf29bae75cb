"""A bar that moves within a sample: parts are counted right, and time is told from what was measured."""

import io
import re

import pytest

from kvprofile import load_model, load_profile
from kvprofile.calibration.calibrate import CANDIDATES
from kvprofile.calibration.hidden_states import count_layers
from kvprofile.calibration.measuring import measure
from kvprofile.calibration.tracking import Pace, Parts, Track
from kvprofile.cli.bars import Bars
from kvprofile.evaluate.check import check_profile
from kvprofile.samples import load_documents, make_samples
from tests.unit.architectures import SUPPORTED, build


class Heard(Track):
    """Remembers the parts of every item."""

    def __init__(self):
        self.parts = []

    def __call__(self, items, label):
        for item in items:
            self.parts.append([])
            yield item

    def part(self, done, of):
        self.parts[-1].append((done, of))


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def samples(loaded, tiny_text_file):
    documents = load_documents(str(tiny_text_file))
    return make_samples(documents, loaded.tokenizer, samples=2, tokens=256, held_out=2, continuation=64)


def counted(of):
    return [(done, of) for done in range(1, of + 1)]


@pytest.mark.parametrize(("candidates", "parts"), [((), 2), (CANDIDATES[:1], 2 + 2 + 2)])
def test_every_layer_of_a_sample_is_a_part(candidates, parts, loaded, samples):
    """Two layers: each is read in the context, and with damage in the probe, and then measured."""
    heard = Heard()
    measure(loaded, samples.calibration, "gauss", candidates=candidates, track=heard)
    assert heard.parts == [counted(parts)] * 2


def test_every_layer_of_the_check_is_a_part(loaded, samples, tiny_profile):
    """Three forwards of two layers through the full cache, the plan and uniform shares."""
    heard = Heard()
    profile = load_profile(tiny_profile)
    check_profile(loaded.model, profile, None, samples.held_out, track=heard, warn=lambda _message: None)
    assert heard.parts == [counted(3 * 2 * 3)] * 2


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_layers_of_every_architecture_are_found(name):
    model = build(name)
    assert count_layers(model) == model.config.get_text_config(decoder=True).num_hidden_layers


def test_time_is_told_as_the_sample_before_took_it():
    now = [0.0]
    pace = Pace(lambda: now[0])

    def sample(times):
        pace.begin()
        told = []
        for number, seconds in enumerate(times, start=1):
            now[0] += seconds
            told.append(pace.at(number, len(times)))
        pace.end()
        return told

    # Two quick parts and two slow ones: alike at first, then by the time they took.
    assert sample([1, 1, 9, 9]) == [0.25, 0.5, 0.75, 1.0]
    assert sample([1, 1, 9, 9]) == [0.05, 0.1, 0.55, 1.0]
    # A sample with other parts is told by its place among them.
    assert sample([1, 1]) == [0.1, 1.0]


def test_a_sample_without_parts_keeps_the_pace():
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.begin()
    now[0] = 3.0
    pace.end()
    assert pace.at(1, 4) == 0.25


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_moves_within_a_sample(monkeypatch):
    monkeypatch.setattr("sys.stderr", told := Terminal())
    bars = Bars(False)
    for _ in bars([1, 2], "measure"):
        parts = Parts(bars, 4)
        for _ in range(4):
            parts.tick()
            bars.bar.refresh()
    shown = re.findall(r"measure: +\d+%\|[^|]*\| ([\d.]+)/2 \[", told.getvalue())
    assert {"0.25", "0.5", "0.75", "1", "2"} <= set(shown)
    assert [float(number) for number in shown] == sorted(float(number) for number in shown)
    # Parts outside a loop, or under a quiet one, are nobody's.
    bars.part(1, 2)
    quiet = Bars(True)
    for _ in quiet([1], "measure"):
        quiet.part(1, 2)
    assert told.getvalue().count("measure:") == len(shown)
