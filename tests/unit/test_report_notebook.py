"""What a profile says of itself, and what one can ask it in Python."""

import re

import numpy as np
import pytest

from kvprofile import load_arrays, load_profile, replan
from kvprofile.errors import KVProfileError, UsageError
from tests.unit.builders import build_profile
from tests.unit.conftest import run


def test_its_repr_says_what_it_does(tiny_profile):
    profile = load_profile(tiny_profile)
    text = repr(profile)
    assert text == str(profile)
    assert text.startswith("<Profile of tiny, 2 layers x 2 KV heads. ")
    assert f"held-out text keeps {100 * profile.check.exact.achieved.mean:.1f}%" in text
    assert "not checked" in repr(build_profile(check=None))


def test_a_notebook_shows_it(tiny_profile):
    shown = load_profile(tiny_profile)._repr_html_()
    assert "held-out text keeps " in shown
    assert "data:image/png;base64," in shown
    assert "://" not in re.sub(r"base64,[^\"]*", "", shown)
    assert "<b>" not in build_profile(name="<b>bold</b>")._repr_html_()


def test_another_budget_is_one_call(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    planned = profile.replan(0.25)
    assert planned == replan(profile, load_arrays(profile, tiny_profile)["damage_mean"], 0.25)
    assert profile.replan(0.25, rule="uniform").plan.rule == "uniform"
    run("plan", tiny_profile, "--budget", "0.25", "-o", tmp_path / "quarter.json")
    assert load_profile(tmp_path / "quarter.json").plan == planned.plan


def test_plots_show_themselves(tiny_profile):
    profile = load_profile(tiny_profile)
    for plot in (profile.plot_similarity(1, 1), profile.plot_plan(), profile.plot_ratios()):
        assert plot._repr_png_().startswith(b"\x89PNG")
    shown = np.ma.filled(profile.plot_similarity(1, 1).axes[0].images[0].get_array(), 0)
    kept = load_arrays(profile, tiny_profile)["similarity_map"][1, 1].astype(np.float32)
    np.testing.assert_array_equal(shown, np.tril(kept))
    with pytest.raises(UsageError, match=r"layer 7 .* layers 0 to 1"):
        profile.plot_similarity(7)


def test_the_report_is_one_call(tiny_profile, tmp_path):
    page = load_profile(tiny_profile).report(tmp_path / "page.html")
    run("report", tiny_profile, "-o", tmp_path / "command.html")
    # Only the name of the file it was made from differs.
    assert page.read_text().replace("page", "tiny") == (tmp_path / "command.html").read_text().replace("page", "tiny")


def test_where_it_lies_is_not_part_of_what_it_says(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    moved = profile.save(tmp_path / "moved.json")
    assert load_profile(moved) == profile
    assert load_profile(moved) != profile.replan(0.25)
    with pytest.raises(KVProfileError, match="save_profile"):
        build_profile().arrays()
