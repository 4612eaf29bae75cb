"""Many methods in one picture: a labelled row each, a column of dots for each measure."""

from collections.abc import Sequence
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvprofile.evaluate.methods import FULL

ROW = 0.17  # inches
MARKS = "osD^v<>PX*"  # one for each budget
STRONG = "black"


def dot_figure(summary: Sequence[dict[str, Any]], judged: Sequence[str], measures: Sequence[str]) -> Figure:
    """A row for each method, a panel for each measure, a mark for each budget, with its interval.

    Methods that differ in what comes after the last comma, "h2o, uniform" and "h2o, by damage", share a row, a colour for
    each; a mark is hollow where more slots were kept than asked. The rows of `judged` methods, in black, are on top; the
    others follow by the first measure, the best first.
    """
    budgets = sorted({entry["slots_asked"] for entry in summary if entry["method"] != FULL}, reverse=True)
    methods = [name for name in dict.fromkeys(entry["method"] for entry in summary) if name != FULL]
    kinds = list(dict.fromkeys(_kind(name) for name in methods if name not in judged and _kind(name)))
    palette = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    rows = _rows(summary, judged, measures[0])
    figure = Figure(figsize=(3.6 * len(measures) + 1.8, ROW * len(rows) + 1.2), layout="constrained")
    axes = list(figure.subplots(1, len(measures), sharey=True, squeeze=False).flat)
    for axis, measure in zip(axes, measures, strict=True):
        for entry in summary:
            name = entry["method"]
            if name == FULL or measure not in entry["measures"]:
                continue
            colour = STRONG if name in judged else palette.get(_kind(name), "grey")
            place = rows.index(_row(name, judged))
            mark = MARKS[budgets.index(entry["slots_asked"]) % len(MARKS)]
            _dot(axis, entry, measure, place, colour=colour, mark=mark)
        _finish(axis, measure, summary)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=7.5)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    marks = [
        Line2D([], [], color="grey", marker=MARKS[index % len(MARKS)], linestyle="none", label=f"budget {budget:g}")
        for index, budget in enumerate(budgets)
    ]
    colours = [Line2D([], [], color=palette[kind], marker="o", linestyle="none", label=kind) for kind in kinds]
    figure.legend(handles=[*colours, *marks], loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    return figure


def _rows(summary: Sequence[dict[str, Any]], judged: Sequence[str], measure: str) -> list[str]:
    """Names of the rows, the judged first, then by the best mean of the measure in each."""
    values: dict[str, list[float]] = {}
    for entry in summary:
        if entry["method"] != FULL and measure in entry["measures"]:
            values.setdefault(_row(entry["method"], judged), []).append(entry["measures"][measure]["mean"])
    sign = 1 if measure.endswith((" KL", " NLL")) else -1
    return sorted(values, key=lambda name: (name not in judged, min(sign * value for value in values[name])))


def _row(name: str, judged: Sequence[str]) -> str:
    return name if name in judged else name.rsplit(", ", 1)[0]


def _kind(name: str) -> str:
    """What comes after the last comma of a method's name; nothing where there is none."""
    return name.rsplit(", ", 1)[1] if ", " in name else ""


def _dot(axis: Axes, entry: dict[str, Any], measure: str, place: int, *, colour: Any, mark: str) -> None:
    """One mean with its interval; hollow where the method kept more slots than it was asked to."""
    estimate = entry["measures"][measure]
    low, high = estimate["interval"]
    fill, edge = ("white", colour) if entry.get("over_budget") else (colour, "white")
    axis.plot([low, high], [place, place], color=colour, linewidth=0.8, alpha=0.7)
    axis.plot(estimate["mean"], place, mark, markersize=4.5, color=fill, markeredgecolor=edge, markeredgewidth=0.5)


def _finish(axis: Axes, measure: str, summary: Sequence[dict[str, Any]]) -> None:
    if measure.endswith(" KL"):
        axis.set_xscale("log")
    else:
        full = [entry["measures"].get(measure) for entry in summary if entry["method"] == FULL]
        for estimate in filter(None, full):
            axis.axvline(estimate["mean"], color="grey", linestyle="--", linewidth=1)
    axis.set_title(measure, fontsize=10)
    axis.set_xlabel("percent" if measure.endswith("score") else "nats per token", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="y", color="#ebebeb", linewidth=0.6)
    axis.set_axisbelow(True)
    sns.despine(ax=axis)
