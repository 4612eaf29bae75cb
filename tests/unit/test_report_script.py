"""What a report does where scripts run, in a real Chromium: the same plans as Python's, facts of heads, and memory."""

import base64
import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from kvprofile import load_profile
from kvprofile.errors import KVProfileError
from kvprofile.planning.plans import replan
from kvprofile.report.budgets import merged_bytes
from kvprofile.report.heads import median_cosine
from kvprofile.report.html import make_subject, read_subject, report_html, write_report
from kvprofile.report.numbers import number, size
from kvprofile.report.plan_maps import bits_of_pair
from kvprofile.report.style import new_plot
from tests.unit.browser import opened, started_browser  # noqa: F401  # the fixture `browser`
from tests.unit.builders import build_profile
from tests.unit.conftest import run
from tests.unit.test_report_figures import large

PROFILES = Path(__file__).parents[2] / "profiles"
BUDGETS = [
    0.1,
    0.123,
    0.15,
    0.2,
    0.222,
    0.25,
    0.3,
    1 / 3,
    0.35,
    0.4,
    0.45,
    0.5,
    0.555,
    0.6,
    0.7,
    0.777,
    0.8,
    0.9,
    0.95,
    1,
]
PLAN = "budget => kvprofile.replan(budget)"
SET = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }"

# By layer and head: what is written in a figure's cells, and their colours.
TEXTS = """figure => Object.fromEntries([...document.querySelectorAll(`#figure-0-${figure} .wide [data-label]`)]
  .map(label => [label.dataset.label, label.textContent.trim()]))"""
FILLS = """figure => Object.fromEntries([...document.querySelectorAll(`#figure-0-${figure} .wide [data-cell]`)]
  .map(cell => [cell.dataset.cell, getComputedStyle(cell.firstElementChild).fill]))"""


def no_figures(_subject, width, _policies):
    """Figures take most of a report's time."""
    return {name: new_plot(width, 20) for name in ("slots", "policies")}


def changed(profile, **plan):
    """The profile as if it had been planned with these settings."""
    return profile.model_copy(update={"plan": profile.plan.model_copy(update=plan)})


def subjects():
    """Profiles that are solved in different ways, and what `replan` has to be told to solve as the page does."""
    smollm = read_subject(PROFILES / "smollm2-135m.json")
    gemma = read_subject(PROFILES / "gemma3-270m.json")
    profile, arrays = large(5, 3, ("gauss", "h2o"), seed=4)
    return {
        "smollm": (smollm.profile, smollm.arrays, {}),
        "one head a layer": (gemma.profile, gemma.arrays, {}),
        "layers": (changed(smollm.profile, granularity="layer"), smollm.arrays, {}),
        "one policy": (changed(smollm.profile, policy="zsmerge", objective="recall"), smollm.arrays, {}),
        "uniform": (changed(smollm.profile, rule="uniform"), smollm.arrays, {"rule": "damage"}),
        "threshold": (
            changed(smollm.profile, rule="cake", mode="threshold", policy="chain"),
            smollm.arrays,
            {"rule": "damage", "mode": "exact", "policy": "auto"},
        ),
        "high floor": (profile, arrays, {}),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")

    def write(name, profile, arrays):
        path = folder / f"{name}.html"
        return path if path.exists() else write_report([make_subject(name, profile, arrays)], path)

    return write


@pytest.fixture(scope="module")
def report(written):
    subject = read_subject(PROFILES / "smollm2-135m.json")
    return written("smollm2-135m", subject.profile, subject.arrays), subject


@pytest.mark.parametrize("name", subjects())
def test_the_page_solves_as_python_does(name, browser, tmp_path, monkeypatch):
    profile, arrays, choices = subjects()[name]
    monkeypatch.setattr("kvprofile.report.html.draw", no_figures)
    path = tmp_path / "page.html"
    path.write_text(report_html([make_subject(name, profile, arrays)]))
    reached = 0
    with opened(browser, path) as page:
        lowest = page.evaluate("kvprofile.lowest")
        for budget in BUDGETS:
            if budget < lowest:
                with pytest.raises(KVProfileError, match="out of reach"):
                    replan(profile, arrays["damage_mean"], budget, **choices)
                continue
            plan = replan(profile, arrays["damage_mean"], budget, **choices).plan
            reached += 1
            found = page.evaluate(PLAN, budget)
            heads = [head for layer in plan.layers for head in layer.heads]
            np.testing.assert_allclose(np.ravel(found["share"]), [head.share for head in heads], rtol=0, atol=6e-7)
            assert [name for row in found["policy"] for name in row] == [head.policy for head in heads]
            # Written with four digits in a profile; the total is not less exact than its parts.
            np.testing.assert_allclose(
                np.ravel(found["damage"]), [head.damage for head in heads], rtol=5e-4, atol=1e-12
            )
            assert found["total"] == pytest.approx(plan.predicted_damage, rel=5e-4)
            assert np.mean(found["share"]) == pytest.approx(budget, abs=1e-9)
        flags = shlex.split(page.inner_text("#command"))[5:-2]
        assert dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True)) == choices
    assert reached >= (6 if name == "high floor" else 18)


def test_its_predicted_damage_is_python_s_to_a_millionth(browser, report):
    path, subject = report
    measured = subject.profile.statistics.damage
    curves = subject.arrays["damage_mean"].astype(np.float64).sum(axis=-1)
    with opened(browser, path) as page:
        for budget in BUDGETS:
            found = page.evaluate(PLAN, budget)
            total = 0.0
            for row in range(30):
                for head in range(3):
                    policy = measured.policies.index(found["policy"][row][head])
                    total += np.interp(
                        found["share"][row][head], [*measured.budgets, 1.0], [*curves[row, policy, head], 0.0]
                    )
            assert found["total"] == pytest.approx(total, rel=1e-9, abs=1e-15)


def test_the_slider_paints_the_plan_and_its_command_makes_the_same_one(browser, report, tmp_path, monkeypatch):
    path, subject = report
    saved = subject.profile.plan
    with opened(browser, path) as page:
        before = page.evaluate(TEXTS, "slots"), page.evaluate(FILLS, "slots")
        page.focus("#budget")
        for _ in range(50):
            page.keyboard.press("ArrowLeft")
        assert page.inner_text("#budget-value") == "25.0%"
        command = shlex.split(page.inner_text("#command"))
        monkeypatch.chdir(tmp_path)
        for kind in ("json", "safetensors"):
            Path(f"smollm2-135m.{kind}").write_bytes((PROFILES / f"smollm2-135m.{kind}").read_bytes())
        assert command[0] == "kvprofile"
        assert run(*command[1:]).exit_code == 0
        plan = load_profile(command[-1]).plan
        shares, names = page.evaluate(TEXTS, "slots"), page.evaluate(TEXTS, "policies")
        letters = {name: letter for letter, name in LEGEND.findall(page.inner_text("#figure-0-policies .wide"))}
        for layer in plan.layers:
            for index, head in enumerate(layer.heads):
                assert float(shares[f"{layer.layer}-{index}"]) == pytest.approx(head.share, abs=0.00501)
                assert names[f"{layer.layer}-{index}"] == letters[head.policy]
        assert page.inner_text("#answer-damage") == number(plan.predicted_damage)
        assert f"{number(plan.predicted_damage / saved.predicted_damage)} × the saved" in page.inner_text(
            "#answer-factor"
        )
        assert page.evaluate(FILLS, "slots") != before[1]
        page.click("#reset")
        assert page.inner_text("#budget-value") == "50.0%"
        assert (page.evaluate(TEXTS, "slots"), page.evaluate(FILLS, "slots")) == before


LEGEND = re.compile(r"([A-Z])\s+([\w-]+) \(\d+\)")


@pytest.fixture(scope="module")
def in_bytes(written):
    smollm = read_subject(PROFILES / "smollm2-135m.json")
    profile = replan(smollm.profile, smollm.arrays["damage_mean"], bytes=0.25, measured=smollm.arrays)
    subject = make_subject("smollm2-135m", profile, smollm.arrays)
    return written("in-bytes", profile, smollm.arrays), subject


def test_a_plan_for_bytes_has_python_s_plans_at_hand(browser, in_bytes):
    path, subject = in_bytes
    with opened(browser, path) as page:
        amounts = page.evaluate("kvprofile.amounts")
        assert len(amounts) > 50
        assert amounts == sorted(amounts)
        assert {0.05, 0.07, 0.1, 0.15, 0.25, 0.35, 0.5, 1} <= set(amounts)
        for amount in (amounts[0], 0.07, 0.1, 0.25, 0.5, 0.8, 1):
            found = page.evaluate(PLAN, amount)
            plan = replan(subject.profile, subject.arrays["damage_mean"], bytes=amount, measured=subject.arrays).plan
            heads = [head for layer in plan.layers for head in layer.heads]
            np.testing.assert_allclose(np.ravel(found["share"]), [head.share for head in heads], rtol=0, atol=6e-7)
            np.testing.assert_allclose(
                np.ravel(found["damage"]), [head.damage for head in heads], rtol=5e-4, atol=1e-12
            )
            assert [name for row in found["policy"] for name in row] == [head.policy for head in heads]
            assert [tuple(pair) for row in found["codecs"] for pair in row] == [
                (head.key_codec, head.value_codec) for head in heads
            ]
            assert found["total"] == plan.predicted_damage
        with pytest.raises(KVProfileError, match="out of reach"):
            replan(subject.profile, subject.arrays["damage_mean"], bytes=amounts[0] - 0.005, measured=subject.arrays)


def test_the_slider_of_bytes_paints_slots_bits_and_policies(browser, in_bytes, tmp_path, monkeypatch):
    path, subject = in_bytes
    with opened(browser, path) as page:
        drawn = page.evaluate(TEXTS, "bits"), page.evaluate(FILLS, "bits")
        page.focus("#budget")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowRight")  # the plan's own bytes, painted by the script instead of by matplotlib
        assert page.inner_text("#budget-value") == "25.0%"
        assert (page.evaluate(TEXTS, "bits"), page.evaluate(FILLS, "bits")) == drawn
        assert page.inner_text("#answer-kept") == f"{subject.profile.plan.predicted_ratio:.1%}"
        while page.inner_text("#budget-value") != "10.0%":
            page.keyboard.press("ArrowLeft")
        assert page.get_attribute("#budget", "aria-valuetext") == "10.0%"
        command = shlex.split(page.inner_text("#command"))
        assert command[:5] == ["kvprofile", "plan", "in-bytes.json", "--bytes", "0.1"]
        monkeypatch.chdir(tmp_path)
        subject.profile.save("in-bytes.json")
        Path("smollm2-135m.safetensors").write_bytes((PROFILES / "smollm2-135m.safetensors").read_bytes())
        assert run(*command[1:]).exit_code == 0
        plan = load_profile(command[-1]).plan
        bits = page.evaluate(TEXTS, "bits")
        for layer in plan.layers:
            for index, head in enumerate(layer.heads):
                assert bits[f"{layer.layer}-{index}"] == bits_of_pair(head.key_codec, head.value_codec)
        assert page.inner_text("#answer-damage") == number(plan.predicted_damage)
        assert page.inner_text("#answer-judgement").startswith("not worth it: more than 0.01 nats")
        page.click("#reset")
        assert (page.evaluate(TEXTS, "bits"), page.evaluate(FILLS, "bits")) == drawn


def test_the_judgement_follows_the_slider(browser, written):
    subject = read_subject(PROFILES / "smollm2-135m.json")
    with opened(browser, written("smollm2-135m", subject.profile, subject.arrays)) as page:
        slider = page.query_selector("#budget")
        for budget, told in (
            (0.5, "worth it"),
            (0.15, "not worth it: more than 0.01 nats"),
            (0.95, "not worth it: saves"),
        ):
            page.evaluate("([input, value]) => (" + SET + ")(input, value)", [slider, budget])
            assert page.inner_text("#answer-judgement").startswith(told)
        page.click("#copy")
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("getSelection().toString()") == page.inner_text("#command")


def test_a_head_tells_its_facts_to_pointer_and_keyboard(browser, report):
    path, subject = report
    cosine = median_cosine(subject.arrays["key_histogram"])

    def told(page, layer, head):
        facts = subject.profile.plan.layers[layer].heads[head]
        text = page.inner_text("#tip")
        for part in (
            f"Layer {layer}, head {head}",
            f"keeps {facts.share:.1%}",
            f"policy {facts.policy}",
            f"damage {number(facts.damage)} nats",
            f"similarity {cosine[layer, head]:.2f}",
        ):
            assert part in text

    for width, kind in ((1280, "wide"), (420, "narrow")):
        with opened(browser, path, viewport={"width": width, "height": 900}) as page:
            assert page.is_hidden("#tip")
            page.hover(f"#figure-0-slots .{kind} [data-cell='7-1']")
            told(page, 7, 1)
            assert page.is_visible("#tip")
            box = page.query_selector("#tip").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            page.hover("h1")
            assert page.is_hidden("#tip")
            page.focus(f"#figure-0-policies .{kind} svg")
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            told(page, 1, 1)
            page.keyboard.press("ArrowLeft")
            told(page, *((0, 1) if kind == "wide" else (1, 0)))
            page.keyboard.press("Escape")
            assert page.is_hidden("#tip")


def test_layers_that_keep_their_stock_cache_say_so(browser, written):
    subject = read_subject(PROFILES / "gemma3-270m.json")
    with opened(browser, written("gemma", subject.profile, subject.arrays)) as page:
        page.hover("#figure-0-slots .wide [data-cell='6-0']")
        assert "keeps its stock cache" in page.inner_text("#tip")
        assert "expect about 0.31" in page.inner_text("#answer-expected")
        page.fill("[name=context]", "32768")
        page.fill("[name=batch]", "4")
        page.select_option("[name=dtype]", "bfloat16")
        merged = 3 * 32768 * 4 * 2 * 256 * 2
        assert page.inner_text("#memory-0-stock") == size(merged)
        assert "merged layers only" in page.inner_text("#memory-0-part")
        page.fill("[name=window]", "512")
        others = 15 * 512 * 4 * 2 * 256 * 2
        assert page.inner_text("#memory-0-stock") == size(merged + others)
        assert page.inner_text("#memory-0-plan") == size(merged // 2 + others)
        assert page.inner_text("#memory-0-saved") == size(merged // 2)
        assert page.inner_text("td[data-budget='0.25']") == size(merged // 4 + others)


def test_memory_is_python_s_at_the_calibration_s_length_and_the_reader_s_elsewhere(browser, report):
    path, subject = report
    with opened(browser, path) as page:
        for row in subject.costs:
            assert page.inner_text(f"td[data-budget='{row.budget}']") == size(merged_bytes(subject.profile, row.budget))
        page.fill("[name=context]", "131072")
        page.fill("[name=batch]", "6")
        page.select_option("[name=dtype]", "float16")
        full = 30 * 3 * 64 * 2 * 2 * 131072 * 6
        assert page.inner_text("#memory-0-stock") == size(full)
        assert page.inner_text("#memory-0-saved") == size(full // 2)
        page.evaluate("([input, value]) => (" + SET + ")(input, value)", [page.query_selector("#budget"), 0.25])
        assert page.inner_text("#memory-0-plan") == size(full // 4)
        assert page.inner_text("#memory-0-budget") == "25.0%"
        page.fill("[name=context]", "")
        assert page.inner_text("#memory-0-stock") == "0 B"


def test_without_scripts_everything_static_is_there_and_no_dead_control(browser, report):
    path, subject = report
    with opened(browser, path, java_script_enabled=False) as page:
        for control in ("#solver", "#memory", "#theme", "#tip"):
            assert page.is_hidden(control)
        for figure in ("slots", "policies", "damage", "similarity", "wall", "ratios", "distance"):
            assert page.is_visible(f"#figure-0-{figure} .wide svg")
        assert page.inner_text("#memory-0-stock") == size(merged_bytes(subject.profile, 1.0))
        assert "Worth it" in page.inner_text("#verdict")


def test_controls_have_names_and_the_policy_allows_this_script_alone(browser, report):
    path, _ = report
    text = path.read_text()
    script = re.search(r"<script>(.*)</script>\n</body>", text, re.DOTALL)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in text
    with opened(browser, path) as page:
        unnamed = """[...document.querySelectorAll('input, select, button, svg[tabindex], pre[tabindex]')].filter(e =>
          !(e.labels?.length || e.textContent.trim() && e.tagName === 'BUTTON' || e.getAttribute('aria-label')))
          .map(e => e.outerHTML.slice(0, 80))"""
        assert page.evaluate(unnamed) == []
    page = browser.new_page()
    page.goto(path.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'foreign = 1'}))")
    assert page.evaluate("typeof foreign") == "undefined"
    page.close()


def test_eighty_layers_of_eight_heads_are_solved_between_two_frames_of_a_slider(browser, tmp_path, monkeypatch):
    profile, arrays = large(80, 8, tuple(f"policy-{index}" for index in range(5)))
    monkeypatch.setattr("kvprofile.report.html.draw", no_figures)
    text = report_html([make_subject("large", profile, arrays)])
    data = re.search(r'<script type="application/json" id="profiles">(.*?)</script>', text, re.DOTALL)[1]
    assert len(data) < 300_000
    assert json.loads(data)[0]["layers"] == 80
    path = tmp_path / "large.html"
    path.write_text(text)
    plan = replan(profile, arrays["damage_mean"], 0.8).plan
    with opened(browser, path) as page:
        found = page.evaluate(PLAN, 0.8)
        heads = [head for layer in plan.layers for head in layer.heads]
        np.testing.assert_allclose(np.ravel(found["share"]), [head.share for head in heads], rtol=0, atol=6e-7)
        assert [name for row in found["policy"] for name in row] == [head.policy for head in heads]


def bare():
    """Profiles whose pages lack something: curves, a check, arrays, or policies to show."""
    smollm = read_subject(PROFILES / "smollm2-135m.json")
    undamaged = smollm.profile.statistics.model_copy(update={"damage": None})
    return {
        "threshold mode, no arrays, two heads": make_subject("tiny", build_profile(), None),
        "no check": make_subject("unchecked", build_profile(check=None), None),
        "no curves": make_subject(
            "no-curves", smollm.profile.model_copy(update={"statistics": undamaged}), smollm.arrays
        ),
        "one head": make_subject("one", *large(1, 1)),
        "a name to quote": make_subject("it's </script> & more", *large(2, 1)),
    }


@pytest.mark.parametrize("name", bare())
def test_a_profile_that_lacks_something_has_a_page_that_works(name, browser, tmp_path):
    subject = bare()[name]
    path = tmp_path / "page.html"
    path.write_text(report_html([subject]))
    curves = subject.arrays is not None and subject.profile.statistics.damage is not None
    with opened(browser, path) as page:
        assert page.locator("#solver").count() == curves
        page.hover("#figure-0-slots .wide [data-cell='0-0']")
        assert f"keeps {subject.profile.plan.layers[0].heads[0].share:.1%}" in page.inner_text("#tip")
        page.fill("[name=context]", "1000")
        facts = subject.profile.model
        full = 1000 * len(facts.attention) * facts.kv_heads * facts.head_dim * 2 * 4
        assert page.inner_text("#memory-0-stock") == size(full)
        if curves:
            page.focus("#budget")
            page.keyboard.press("ArrowRight")
            words = shlex.split(page.inner_text("#command"))
            assert words[:3] == ["kvprofile", "plan", f"{subject.name}.json"]
            assert words[-1].startswith(f"{subject.name}-0.")
