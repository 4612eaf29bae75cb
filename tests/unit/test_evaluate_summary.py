"""Estimates, paired differences and tables from rows written by hand."""

import numpy as np
import pytest

from kvprofile.evaluate.figures import quality_figure
from kvprofile.evaluate.intervals import bootstrap, equal_groups
from kvprofile.evaluate.methods import FULL
from kvprofile.evaluate.rows import Row
from kvprofile.evaluate.summary import by_group, summarise
from kvprofile.evaluate.tables import difference_table, group_table, main_table

VALUES = {
    FULL: [(0.0, 50.0), (0.0, 100.0), (0.0, 0.0), (0.0, 100.0)],
    "mine": [(0.1, 50.0), (0.3, 100.0), (0.2, 0.0), (0.4, 0.0)],
    "h2o": [(0.2, 0.0), (0.2, 100.0), (0.4, 100.0), (0.8, 0.0)],
    "snapkv": [(0.9, 0.0), (0.9, 0.0), (0.9, 0.0), (0.9, 0.0)],
}
GROUPS = ["essay", "code", "essay", "essay"]


def rows(budget=0.5):
    return [
        Row(
            key=f"{method} {unit}",
            bench="toy",
            unit=str(unit),
            group=GROUPS[unit],
            method=method,
            budget=1.0 if method == FULL else budget,
            tokens=100,
            slots=1.0 if method == FULL else 0.5 + unit / 100,
            nbytes=1000 if method == FULL else 500,
            values={"recall KL": kl, "toy score": score},
        )
        for method, numbers in VALUES.items()
        for unit, (kl, score) in enumerate(numbers)
    ]


def test_means_give_every_group_the_same_weight():
    summary = {entry["method"]: entry for entry in summarise(rows())}
    mine = summary["mine"]
    assert mine["measures"]["recall KL"]["mean"] == pytest.approx((np.mean([0.1, 0.2, 0.4]) + 0.3) / 2, abs=1e-6)
    assert mine["bytes"] == 0.5
    assert mine["slots"] == pytest.approx(0.515)
    assert mine["slots_range"] == [0.5, 0.53]
    assert next(iter(summary)) == FULL


def test_differences_are_paired_and_the_rival_is_the_best_other_method():
    summary = {entry["method"]: entry["measures"] for entry in summarise(rows())}
    kl, score = summary["mine"]["recall KL"], summary["mine"]["toy score"]
    assert kl["best_rival"] == "h2o"
    assert kl["against_best_rival"]["mean"] == pytest.approx((np.mean([-0.1, -0.2, -0.4]) + 0.1) / 2, abs=1e-6)
    assert score["best_rival"] == "h2o"
    assert score["against_full"]["mean"] == pytest.approx((np.mean([0, 0, -100]) + 0) / 2, abs=1e-4)
    assert summary["h2o"]["recall KL"]["best_rival"] == "mine"
    assert summary["snapkv"]["toy score"]["best_rival"] in ("mine", "h2o")
    # The interval of pairs is that of the differences, drawn over whole documents.
    differences = np.array([-0.1, 0.1, -0.2, -0.4])
    weights = np.array([1 / 6, 1 / 2, 1 / 6, 1 / 6])
    draws = np.random.default_rng(5).integers(0, 4, (20_000, 4))
    means = [(differences[draw] * weights[draw]).sum() / weights[draw].sum() for draw in draws]
    assert kl["against_best_rival"]["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_weights():
    assert equal_groups(["a", "b", "a", "a"]) == pytest.approx([1 / 6, 1 / 2, 1 / 6, 1 / 6])
    assert bootstrap([1.0, 2.0, 4.0], [1, 1, 1]) == bootstrap([1.0, 2.0, 4.0])


def test_methods_of_another_budget_are_no_rivals():
    other = [row for row in rows(0.25) if row.method in ("mine", FULL)]
    summary = summarise([row for row in rows() if row.method != FULL] + other)
    alone = next(entry for entry in summary if entry["slots_asked"] == 0.25)
    assert "best_rival" not in alone["measures"]["recall KL"]
    assert [entry["slots_asked"] for entry in summary] == [1.0, 0.5, 0.5, 0.5, 0.25]


def test_groups_on_their_own():
    found = {(entry["group"], entry["method"]): entry for entry in by_group(rows())}
    assert found["code", "mine"]["measures"]["recall KL"]["mean"] == pytest.approx(0.3)
    assert found["essay", "h2o"]["measures"]["toy score"]["mean"] == pytest.approx(100 / 3, abs=1e-4)
    assert found["essay", "h2o"]["count"] == 3


def test_tables():
    summary = summarise(rows())
    lines = main_table(summary).splitlines()
    assert lines[0] == "| budget | method | slots | bytes | recall KL | toy score |"
    assert lines[2].startswith("| 1 | full cache | 1.000 | 1.000 | 0.0000 |")
    assert lines[3].startswith("| 0.5 | mine | 0.515 | 0.500 | **0.2667** (")
    assert "**" in lines[4].rsplit("|", 2)[1]  # h2o has the best score
    assert len({line.count("|") for line in lines}) == 1
    differences = difference_table(summary, "against_best_rival").splitlines()
    assert " h2o |" in differences[2]
    assert "-0.0667 (" in differences[2]
    assert "recall KL" not in difference_table(summary, "against_full")
    assert "| 0.5 | mine | 0.2333 / 16.7 | 0.3000 / 100.0 |" in group_table(by_group(rows()))


def test_who_keeps_more_than_asked_is_no_rival():
    greedy = [Row(**{**vars(row), "slots": 0.53}) if row.method == "h2o" else row for row in rows()]
    summary = {entry["method"]: entry for entry in summarise(greedy)}
    assert [name for name, entry in summary.items() if entry["over_budget"]] == ["h2o"]
    assert summary["mine"]["measures"]["recall KL"]["best_rival"] == "snapkv"
    assert summary["h2o"]["measures"]["recall KL"]["best_rival"] == "mine"
    line = next(line for line in main_table(list(summary.values())).splitlines() if "h2o" in line)
    assert "| 0.530 over |" in line
    assert "**" not in line


def test_very_many_methods_get_a_labelled_row_each():
    def entry(method, mean=0.1, budget=0.5):
        measures = {
            "recall KL": {"mean": mean, "interval": [mean / 2, 2 * mean]},
            "toy score": {"mean": 3.0, "interval": [1, 4]},
        }
        return {
            "method": method,
            "slots_asked": budget,
            "bytes": 0.5,
            "measures": measures,
            "over_budget": budget == 0.25,
        }

    def figure(count):
        summary = [
            entry(f"m{number}, {how}", mean=1 / (number + 1), budget=budget)
            for number in range(count)
            for how in ("uniform", "by damage")
            for budget in (0.5, 0.25)
        ]
        return quality_figure([entry("full cache", budget=1.0), entry("ours", mean=9.0), *summary], ["ours"])

    def legend(plot):
        return [text.get_text() for text in plot.legends[0].get_texts()]

    few, many = figure(2), figure(11)
    assert legend(few)[:5] == ["ours", "m0, uniform", "m0, by damage", "m1, uniform", "m1, by damage"]
    assert legend(many) == ["uniform", "by damage", "budget 0.5", "budget 0.25"]
    rows = [label.get_text() for label in many.axes[0].get_yticklabels()]
    assert rows == ["ours", *(f"m{number}" for number in range(10, -1, -1))]  # the judged first, then the best
    dots = [line for line in many.axes[0].lines if line.get_marker() not in ("None", None)]
    places = {(round(float(line.get_xdata()[0]), 6), int(line.get_ydata()[0]), line.get_color()) for line in dots}
    assert (9.0, 0, "black") in places
    for number in range(11):
        at = {place for mean, place, _ in places if mean == round(1 / (number + 1), 6)}
        assert at == {rows.index(f"m{number}")}
    assert sum(line.get_color() == "white" for line in dots) == 22  # hollow: over their budget
    assert [axis.get_xscale() for axis in many.axes] == ["log", "linear"]
