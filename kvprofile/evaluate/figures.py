"""The bench's plots: quality against bytes, and the needle's grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvprofile.errors import KVProfileError
from kvprofile.evaluate.dots import dot_figure
from kvprofile.evaluate.methods import FULL
from kvprofile.evaluate.rows import Row

DPI = 150
COLUMNS = 3
CROWDED = 20  # methods in one picture
LEGEND_ROWS = 14  # that fit beside one line of panels
MARKS = "osD^v<>PX*"


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG. Raises KVProfileError where it cannot be written."""
    try:
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    except OSError as error:
        raise KVProfileError(f"cannot write {path}: {error.strerror}; choose another -o") from error
    return path


def quality_figure(summary: Sequence[dict[str, Any]], judged: Sequence[str]) -> Figure:
    """Every measure of every method: its mean with interval, against the bytes kept, or in rows where methods are many.

    The methods named in `judged` are drawn strong; the full cache is a dashed line.
    """
    measures = [
        name
        for name in dict.fromkeys(name for entry in summary for name in entry["measures"])
        if not name.endswith(("recall NLL", "look-up NLL", "continuation NLL", "top-1")) and " without " not in name
    ]
    methods = [name for name in dict.fromkeys(entry["method"] for entry in summary) if name != FULL]
    if len(methods) > CROWDED:
        return dot_figure(summary, judged, measures)
    columns = min(COLUMNS, len(measures))
    lines = -(-len(measures) // columns)
    legend_columns = -(-(len(methods) + 1) // (LEGEND_ROWS * lines))
    figure = Figure(figsize=(4.2 * columns + 2.4 * legend_columns, 3.2 * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    palette = dict(zip(methods, sns.color_palette("husl", len(methods)), strict=True))
    looks = {name: _Look("black" if name in judged else palette[name], strong=name in judged) for name in methods}
    shown: dict[str, Any] = {}
    for axis, measure in zip(axes, measures, strict=False):
        _panel(axis, [entry for entry in summary if measure in entry["measures"]], measure, looks)
        handles, found = axis.get_legend_handles_labels()
        shown |= dict(zip(found, handles, strict=True))
    for axis in axes[len(measures) :]:
        axis.set_visible(False)
    names = [name for name in (*methods, FULL) if name in shown]
    figure.legend(
        [shown[name] for name in names],
        names,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        ncols=legend_columns,
    )
    return figure


@dataclass(frozen=True)
class _Look:
    """How a method is drawn: its colour, in strong lines or thin ones."""

    colour: Any
    strong: bool


def _panel(axis: Axes, entries: Sequence[dict[str, Any]], measure: str, looks: dict[str, _Look]) -> None:
    for number, (method, look) in enumerate(looks.items()):
        points = sorted((entry["bytes"], entry["measures"][measure]) for entry in entries if entry["method"] == method)
        if not points:
            continue
        means = np.array([estimate["mean"] for _, estimate in points])
        ends = np.array([estimate["interval"] for _, estimate in points]).T
        axis.errorbar(
            [place for place, _ in points],
            means,
            yerr=np.abs(ends - means),
            label=method,
            color=look.colour,
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            linewidth=2.2 if look.strong else 1.1,
            elinewidth=0.7,
            capsize=2,
            zorder=3 if look.strong else 2,
        )
    full = next((entry["measures"][measure]["mean"] for entry in entries if entry["method"] == FULL), None)
    if measure.endswith(" KL"):
        axis.set_yscale("log")
    elif full is not None:
        axis.axhline(full, color="grey", linestyle="--", linewidth=1, label=FULL)
    if measure.endswith(" score"):
        axis.set_ylim(-4, 104)
    axis.set_title(measure, fontsize=10)
    axis.set_xlabel("bytes kept, of the full cache's")
    axis.set_ylabel("percent" if measure.endswith("score") else "nats per token")
    sns.despine(ax=axis)


def grid_figure(rows: Sequence[Row], bench: str) -> Figure:
    """A heatmap for each method and budget: the score by length (columns) and depth (rows), and below it the NLL."""
    methods = sorted({(row.method, row.budget) for row in rows}, key=lambda key: (key[0] != FULL, -key[1], key[0]))
    lengths = sorted({row.place[0] for row in rows if row.place})
    depths = sorted({row.place[1] for row in rows if row.place})
    columns = min(6, len(methods))
    blocks = -(-len(methods) // columns)
    figure = Figure(figsize=(2.3 * columns + 1, 4.4 * blocks + 0.3), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    measures = (f"{bench} score", f"{bench} NLL")
    scales = {measures[0]: ("RdYlGn", 0.0, 100.0), measures[1]: ("RdYlGn_r", 0.0, _most(rows, measures[1]))}
    for axis in axes.flat:
        axis.set_visible(False)
    for number, key in enumerate(methods):
        for line, measure in enumerate(measures):
            axis = axes[2 * (number // columns) + line, number % columns]
            axis.set_visible(True)
            own = [row for row in rows if (row.method, row.budget) == key]
            cells = np.array(
                [
                    [
                        np.mean([row.values[measure] for row in own if row.place == (length, depth)])
                        for length in lengths
                    ]
                    for depth in depths
                ]
            )
            colours, low, high = scales[measure]
            sns.heatmap(
                cells,
                ax=axis,
                cmap=colours,
                vmin=low,
                vmax=high,
                cbar=False,
                annot=True,
                fmt=".0f" if line == 0 else ".2f",
                annot_kws={"size": 7},
                xticklabels=[f"{length:,}" for length in lengths],
                yticklabels=[f"{depth:.0%}" for depth in depths],
            )
            axis.tick_params(labelsize=7)
            axis.set_title(f"{key[0]}{'' if key[0] == FULL else f', {key[1]:g}'}" if line == 0 else "NLL", fontsize=8)
    figure.supxlabel("tokens of the context", fontsize=9)
    figure.supylabel("depth of the fact", fontsize=9)
    return figure


def _most(rows: Sequence[Row], measure: str) -> float:
    return max(row.values[measure] for row in rows)
