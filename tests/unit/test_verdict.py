"""The verdict: what it calls worth it, from the check and the curves, in the same words wherever it is printed."""

import re
import shutil
from pathlib import Path

import pytest

from kvprofile import load_profile
from kvprofile.report.budgets import Cost, costs
from kvprofile.report.html import card_html, read_subject
from kvprofile.report.judgement import covered_bytes, judge, missed_by, prediction_remark
from kvprofile.report.verdict import verdict
from tests.unit.builders import build_profile
from tests.unit.conftest import run

PROFILES = Path(__file__).parents[2] / "profiles"


def checked(*, recall=0.001, continuation=0.001, top1=0.99, bytes_ratio=0.5, budget=0.5, predicted=None, **model):
    """A profile whose check measured this."""
    base = build_profile().model_dump()
    fidelity = base["check"]["exact"]["fidelity"] | {
        "recall_kl": recall,
        "continuation_kl": continuation,
        "recall_top1": top1,
    }
    mode = {"achieved": {"mean": budget, "std": 0.0, "worst": budget}, "fidelity": fidelity}
    return build_profile(
        model=base["model"] | model,
        plan=base["plan"] | {"budget": budget, "mode": "exact", "predicted_damage": predicted},
        check=base["check"] | {"exact": mode, "bytes_ratio": bytes_ratio},
    )


def rows(**damage):
    """Costs by budget, written as b50=0.001."""
    return [Cost(int(name[1:]) / 100, value, None, None) for name, value in damage.items()]


def test_the_shipped_profiles_are_judged_apart():
    smollm, gemma = (load_profile(PROFILES / f"{name}.json") for name in ("smollm2-135m", "gemma3-270m"))
    worth, not_worth = judge(smollm, costs(smollm, smollm.arrays())), judge(gemma, costs(gemma, gemma.arrays()))
    assert (worth.word, worth.good) == ("Worth it", True)
    assert "saves 49% of the bytes, and 0.9% of the most likely tokens change" in worth.reason
    assert "Down to a budget of 0.25" in worth.reason
    assert (not_worth.word, not_worth.good) == ("Not worth it: 8% of the bytes for 13% of the tokens", False)
    assert "Only 3 of 18 layers are merged, 16% of the bytes at 2,048 tokens" in not_worth.reason


def test_a_plan_for_bytes_is_judged_by_what_is_served():
    smollm = load_profile(PROFILES / "smollm2-135m.json")
    planned = smollm.replan(bytes=0.25)
    # Measured in float32, where packed slots are a smaller part of the cache.
    check = smollm.check.model_copy(update={"bytes_ratio": 0.13})
    for profile in (planned, planned.model_copy(update={"check": check})):
        judged = judge(profile, costs(profile, smollm.arrays()))
        assert judged.word.startswith("Worth it")
        assert "It saves 75% of a 16-bit cache's bytes, and " in judged.reason
        assert "Down to 0.15 of the bytes" in judged.reason


@pytest.mark.parametrize(
    ("profile", "other", "word"),
    [
        (checked(), rows(), "Worth it"),
        (checked(), rows(b25=0.009, b50=0.001, b75=0.0001), "Worth it"),
        (checked(recall=0.1), rows(b50=0.09, b75=0.001, b90=0.0001), "Worth it at 0.75, as predicted"),
        # The prediction was ten times too low, so the next budget is not believed either.
        (checked(recall=0.1, predicted=0.01), rows(b50=0.01, b75=0.002, b80=0.0005), "Worth it at 0.8, as predicted"),
        (checked(budget=0.95, bytes_ratio=0.95), rows(b50=0.001, b95=1e-6), "Worth it at 0.5, as predicted"),
        (checked(recall=0.1), rows(b50=0.1, b95=0.001), "Not worth it: 50% of the bytes for 1.0% of the tokens"),
        (checked(recall=0.1, top1=0.7), rows(), "Not worth it: 50% of the bytes for 30% of the tokens"),
        (build_profile(check=None), rows(), "Not judged"),
    ],
)
def test_the_judgement_follows_the_measured_damage_and_the_bytes(profile, other, word):
    assert judge(profile, other).word == word


def test_without_a_check_the_prediction_is_judged_and_called_one():
    profile = load_profile(PROFILES / "smollm2-135m.json")
    quarter, tenth = profile.replan(0.25), profile.replan(0.1)
    assert judge(quarter).word == "Worth it, as predicted"
    assert "0.0075 nats per token is predicted, not measured" in judge(quarter).reason
    assert judge(tenth, costs(tenth, profile.arrays())).word == "Worth it at 0.25, as predicted"
    assert judge(tenth).word == "Not worth it: 90% of the bytes for 0.084 nats per token (predicted)"


def test_the_merged_layers_part_of_the_bytes_is_measured_or_counted():
    kinds = ["full_attention"]
    assert covered_bytes(checked(bytes_ratio=0.8)) == pytest.approx(0.4)
    assert covered_bytes(checked(bytes_ratio=1.2)) == 0
    assert covered_bytes(build_profile(check=None)) == 1.0
    assert covered_bytes(checked(budget=1.0, bytes_ratio=1.0, attention=kinds * 2)) == 1.0


@pytest.mark.parametrize(
    ("predicted", "told"), [(0.02, None), (0.015, None), (0.01, "2.0 times as much"), (0.04, "2.0 times less")]
)
def test_a_prediction_that_missed_is_remarked_on(predicted, told):
    profile = checked(recall=0.018, continuation=0.002, predicted=predicted)
    assert missed_by(profile) == pytest.approx(0.02 / predicted)
    remark = prediction_remark(profile)
    assert remark is None if told is None else told in remark
    assert (remark in verdict(profile)) == (remark is not None)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_terminal_and_card_say_the_same(name):
    path = PROFILES / f"{name}.json"
    subject = read_subject(path)
    lines = verdict(subject.profile, subject.costs)
    shown = " ".join(run("show", path).stdout.split())
    card = " ".join(re.sub(r"<[^>]*>", " ", card_html(subject.profile)).split())
    for line in lines:
        assert line in shown
    for line in lines[1:]:
        assert line in card
    assert "passages of the context repeated" in lines[2]


def test_show_without_the_arrays_judges_its_own_budget_alone(tmp_path):
    path = Path(shutil.copy(PROFILES / "smollm2-135m.json", tmp_path))
    told = " ".join(run("show", path).stdout.split())
    assert "Worth it. It saves 49% of the bytes" in told
    assert "Down to a budget" not in told
