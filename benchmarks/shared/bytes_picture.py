"""KL against bytes, both in logarithms: plans as a line, rivals as points with their names."""

from collections.abc import Sequence
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

TICKS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)
SIDES = ((5, 3), (5, -9), (-5, 3), (-5, -9))  # points from the mark
FAMILIES = ("transformers", "KVTuner-like", "KIVI", "TurboQuant")


def picture(summary: Sequence[dict[str, Any]]) -> Figure:
    """`summary`: `method`, `plan` (true for plans), `bytes`, and `mean` and `interval` of both measures."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    palette = dict(zip((*FAMILIES, ""), sns.color_palette("deep"), strict=False))
    for axis, measure in zip(figure.subplots(1, 2), ("recall KL", "continuation KL"), strict=True):
        plans = sorted((entry for entry in summary if entry["plan"]), key=lambda entry: entry["bytes"])
        if plans:
            means = [entry[measure]["mean"] for entry in plans]
            axis.plot([entry["bytes"] for entry in plans], means, "o-", color="black", label="plans", zorder=4)
            low, high = zip(*(entry[measure]["interval"] for entry in plans), strict=True)
            axis.fill_between([entry["bytes"] for entry in plans], low, high, color="black", alpha=0.12, linewidth=0)
        for entry in summary:
            if entry["plan"]:
                continue
            family = next((name for name in FAMILIES if entry["method"].startswith(name)), "")
            place = entry["bytes"], entry[measure]["mean"]
            axis.plot(*place, "s", color=palette[family], markersize=5, zorder=3)
        axis.set(xscale="log", yscale="log", title=measure, xlabel="bytes, of the stock cache in 16 bits")
        shown = [tick for tick in TICKS if tick >= 0.8 * min(entry["bytes"] for entry in summary)]
        axis.set_xticks(shown)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.25)
        sns.despine(ax=axis)
        if plans:
            axis.legend(frameon=False)
        _name_points(figure, axis, [entry for entry in summary if not entry["plan"]], measure)
    return figure


def _name_points(figure: Figure, axis: Axes, entries: Sequence[dict[str, Any]], measure: str) -> None:
    """Write every name beside its point, on the first side where it covers no other name and no point."""
    figure.draw_without_rendering()  # places are known from here on
    points = axis.transData.transform([(entry["bytes"], entry[measure]["mean"]) for entry in entries])
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in points]
    for entry in entries:
        place = entry["bytes"], entry[measure]["mean"]
        for side in SIDES:
            name = axis.annotate(
                entry["method"],
                place,
                xytext=side,
                textcoords="offset points",
                ha="left" if side[0] > 0 else "right",
                fontsize=7.5,
            )
            box = name.get_window_extent()
            if side == SIDES[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            name.remove()
