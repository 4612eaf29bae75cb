"""Curves: damage against budget, compression ratio against threshold, similarity against distance."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import ModeCheck
from kvprofile.report.budgets import Cost
from kvprofile.report.heads import Arrays, common_threshold, seen_layers
from kvprofile.report.measured import measured_damage, own_check
from kvprofile.report.numbers import number
from kvprofile.report.plan_words import asked
from kvprofile.report.style import ACCENT, INK, MUTED, NARROW, RIVAL, RULE, Plot, drawing, new_plot, part, ramp


def damage_curve(profile: Profile, rows: Sequence[Cost], width: int) -> Plot:
    """Predicted damage against budget on a logarithmic scale, with the plan's own budget and what the check measured."""
    with drawing():
        plot = new_plot(width, 330 if width > NARROW else 300)
        axis = plot.subplots()
        axis.grid(axis="y")
        budgets = [row.budget for row in rows]
        planned, uniform = ([value or np.nan for value in values] for values in zip(*map(_damages, rows), strict=True))
        axis.plot(budgets, uniform, "--", color=RIVAL, linewidth=1.6, label="uniform shares, predicted")
        axis.plot(budgets, planned, color=ACCENT, linewidth=2, label="this plan's settings, predicted")
        budget, damage = profile.plan.asked, profile.plan.predicted_damage
        if damage:
            _ring(axis, budget, damage, ACCENT, f"the plan: {asked(profile.plan)}, {number(damage)}")
        if profile.check is not None:
            own, even = own_check(profile), profile.check.uniform
            for check, colour, label in ((even, RIVAL, "uniform, measured"), (own, ACCENT, "the plan, measured")):
                axis.plot(
                    _place(profile, check),
                    measured_damage(check.fidelity, profile.plan.objective),
                    "D",
                    markersize=6.5,
                    color=colour,
                    label=f"{label} on held-out text",
                )
        _budget_axes(axis, in_slots=profile.plan.bytes is None)
        axis.axvline(budget, color=MUTED, linestyle=":", linewidth=1).set_gid(part("part", "budget-mark"))
        axis.spines["bottom"].set_gid(part("part", "budget-axis"))
        _legend(plot, axis, width)
    return plot


def overlaid_damage(subjects: Sequence[tuple[str, Profile, Sequence[Cost]]], width: int) -> Plot:
    """Predicted damage of two profiles against budget, and of each the plan and what its check measured."""
    with drawing():
        plot = new_plot(width, 330 if width > NARROW else 400)
        axis = plot.subplots()
        axis.grid(axis="y")
        for (name, profile, rows), colour in zip(subjects, (ACCENT, RIVAL), strict=True):
            budgets = [row.budget for row in rows]
            planned, uniform = (
                [value or np.nan for value in values] for values in zip(*map(_damages, rows), strict=True)
            )
            axis.plot(budgets, uniform, "--", color=colour, linewidth=1.2, alpha=0.6, label=f"{name}: uniform")
            axis.plot(budgets, planned, color=colour, linewidth=2, label=f"{name}: predicted")
            if damage := profile.plan.predicted_damage:
                _ring(axis, profile.plan.asked, damage, colour, f"{name}: the plan")
            if profile.check is not None:
                own = own_check(profile)
                found = measured_damage(own.fidelity, profile.plan.objective)
                axis.plot(_place(profile, own), found, "D", markersize=6.5, color=colour, label=f"{name}: measured")
        _budget_axes(axis, in_slots=all(profile.plan.bytes is None for _, profile, _ in subjects))
        _legend(plot, axis, width)
    return plot


def _place(profile: Profile, check: ModeCheck) -> float:
    """Where a check stands among budgets: what it kept of the slots; plans for bytes keep what they were planned to."""
    plan = profile.plan
    return check.achieved.mean if plan.bytes is None else plan.predicted_bytes or plan.bytes


def ratio_curves(profile: Profile, width: int) -> Plot:
    """Compression ratio against threshold, a line and a band for each layer, and every layer at one threshold."""
    statistics = profile.statistics
    thresholds, at = np.array(statistics.thresholds), common_threshold(profile)
    layers = seen_layers(profile)
    mean = np.array([np.mean(statistics.layers[layer].ratio, axis=0) for layer in layers])
    # The spread of single heads: a band as wide as the heads' own uncertainty.
    spread = np.array([np.mean(statistics.layers[layer].ratio_std, axis=0) for layer in layers])
    colours = [ramp(layer / max(1, profile.model.layers - 1)) for layer in layers]
    with drawing():
        plot = new_plot(width, 340 if width > NARROW else 560)
        left, right = plot.subplots(*((1, 2) if width > NARROW else (2, 1)))
        for line, band, colour in zip(mean, spread, colours, strict=True):
            left.fill_between(thresholds, line - band, line + band, color=colour, alpha=0.12, linewidth=0)
            left.plot(thresholds, line, color=colour, linewidth=1.2)
        left.axvline(thresholds[at], color=MUTED, linestyle=":", linewidth=1)
        _mark(left, thresholds[at], f"ε = {thresholds[at]:g}")
        flat = np.flatnonzero((mean - mean[:, :1] < 0.01).all(axis=0))
        # Where nothing merges, curves are flat to the end, and an axis of no length cannot be drawn.
        left.set_xlim(min(max(0.0, thresholds[flat[-1]]), 0.9) if len(flat) else 0.0, 1)
        left.set_ylim(0, 1.02)
        left.set_xlabel("threshold ε (cosine)")
        left.set_ylabel("slots kept / tokens")
        for layer, line, band, colour in zip(layers, mean[:, at], spread[:, at], colours, strict=True):
            right.errorbar(layer, line, band, fmt="o", color=colour, markersize=5, linewidth=1.6)
        right.set_ylim(0, 1.02)
        right.set_xlim(-0.8, profile.model.layers - 0.2)
        right.set_xlabel("layer")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_title(f"at ε = {thresholds[at]:g}", loc="left", color=MUTED)
        right.grid(axis="y")
        if width > NARROW:
            right.set_yticklabels([])
        else:
            right.set_ylabel("slots kept / tokens")
    return plot


def distance_curves(profile: Profile, arrays: Arrays, chosen: Sequence[tuple[int, int]], width: int) -> Plot:
    """Mean key similarity against distance in tokens: the chosen heads, over the band in which all heads lie."""
    distances, similarity = arrays["distances"].astype(np.int64), arrays["similarity_by_distance"].astype(np.float64)
    # Beyond, a distance is the mean of few pairs, all with the text's first tokens.
    shown = distances <= 0.9 * distances.max()
    distances, similarity = distances[shown], similarity[..., shown]
    every = similarity[seen_layers(profile)].reshape(-1, len(distances))
    low, middle, high = np.percentile(every, (5, 50, 95), axis=0)
    with drawing():
        plot = new_plot(width, 330)
        axis = plot.subplots()
        axis.grid(axis="y")
        axis.fill_between(distances, low, high, color=RULE, alpha=0.35, linewidth=0, label="90% of all heads")
        axis.plot(distances, middle, "--", color=INK, linewidth=1.2, label="median of all heads")
        for layer, head in chosen:
            colour = ramp(layer / max(1, profile.model.layers - 1))
            axis.plot(
                distances, similarity[layer, head], color=colour, linewidth=1.5, label=f"layer {layer}, head {head}"
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlim(distances[0], distances[-1])
        axis.set_xlabel("distance in tokens")
        axis.set_ylabel("mean cosine of keys")
        _legend(plot, axis, width)
    return plot


def _ring(axis: Axes, budget: float, damage: float, colour: str, label: str) -> None:
    """The plan itself, around whatever lies there."""
    axis.plot(
        budget,
        damage,
        "o",
        color=colour,
        markersize=14,
        markerfacecolor="none",
        markeredgewidth=2,
        linestyle="none",
        label=label,
    )


def _budget_axes(axis: Axes, *, in_slots: bool) -> None:
    """Damage on a logarithmic scale against the budget from 0 to 1."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.minorticks_off()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("budget: slots kept" if in_slots else "bytes kept, of a 16-bit cache")
    axis.set_ylabel("damage, nats per token")


def _damages(row: Cost) -> tuple[float | None, float | None]:
    return row.damage, row.uniform


def _legend(plot: Plot, axis: Axes, width: int) -> None:
    """Beside the curves where there is room, below them on a narrow page."""
    handles, labels = axis.get_legend_handles_labels()
    if width > NARROW:
        plot.legend(handles, labels, loc="outside right upper")
    else:
        plot.legend(handles, labels, loc="outside lower left", ncols=2 if max(map(len, labels)) < 25 else 1)


def _mark(axis: Axes, place: float, text: str) -> None:
    """A text above the axes, where no curve runs."""
    axis.text(place, 1.01, text, transform=axis.get_xaxis_transform(), ha="center", va="bottom", color=MUTED)
