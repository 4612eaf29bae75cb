"""Plots of a profile: similarity maps as in the paper's Fig. 2, compression ratios as in its Fig. 3, and the plan."""

from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from kvprofile.errors import KVProfileError
from kvprofile.profile import Profile

DPI = 150


def write_plots(
    profile: Profile,
    arrays: dict[str, NDArray[np.generic]],
    folder: Path,
    *,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
) -> list[Path]:
    """Draw every plot as PNG into `folder`; returns the paths. Files of an earlier run are replaced."""
    layers = layers or sorted({round(place) for place in np.linspace(0, profile.model.layers - 1, 6)})
    heads = heads or [0]
    figures = {
        "similarity.png": similarity_maps(arrays["similarity_map"], layers, heads),
        "ratios.png": ratio_curves(profile),
        "plan.png": plan_map(profile),
        "distance.png": distance_curves(arrays["distances"], arrays["similarity_by_distance"], layers, heads),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVProfileError(f"cannot write plots to {folder}: {error.strerror}; give another folder") from error
    paths = []
    for name, figure in figures.items():
        path = folder / name
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
        paths.append(path)
    return paths


def similarity_maps(maps: NDArray[np.generic], layers: list[int], heads: list[int]) -> Figure:
    """Lower triangles of key similarity, one panel per layer and head, on one scale from -1 to 1."""
    figure = Figure(figsize=(2.4 * len(layers) + 0.8, 2.6 * len(heads) + 0.4), layout="constrained")
    axes = figure.subplots(len(heads), len(layers), squeeze=False)
    hidden = np.triu(np.ones(maps.shape[-2:], dtype=bool), k=1)
    scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    for row, head in enumerate(heads):
        for column, layer in enumerate(layers):
            axis = axes[row, column]
            cells = np.ma.array(maps[layer, head].astype(np.float32), mask=hidden)
            axis.imshow(cells, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
            sns.despine(ax=axis, left=True, bottom=True)
    figure.colorbar(scale, ax=axes, shrink=0.7, label="cosine of keys, mean over cells")
    figure.suptitle("Key similarity, token by token (oldest at the top left)", fontsize=11)
    return figure


def ratio_curves(profile: Profile) -> Figure:
    """Compression ratio against threshold, a line for each layer, with the budget and the band over samples."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    thresholds = np.array(profile.statistics.thresholds)
    colours = sns.color_palette("viridis", profile.model.layers)
    for entry, colour in zip(profile.statistics.layers, colours, strict=True):
        mean = np.mean(entry.ratio, axis=0)
        # The spread of single heads: a band as wide as the heads' own uncertainty.
        spread = np.mean(entry.ratio_std, axis=0)
        axis.plot(thresholds, mean, color=colour, linewidth=1)
        axis.fill_between(thresholds, mean - spread, mean + spread, color=colour, alpha=0.08, linewidth=0)
    axis.axhline(profile.plan.budget, color="0.3", linestyle="--", linewidth=1)
    axis.annotate(
        f"budget {profile.plan.budget:g}",
        (0.01, profile.plan.budget),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("threshold epsilon (cosine)")
    axis.set_ylabel("slots kept / tokens")
    axis.set_title(f"{profile.model.name}: compression ratio against threshold, {profile.statistics.rule} sets")
    _layer_colourbar(figure, axis, profile.model.layers)
    sns.despine(ax=axis)
    return figure


def plan_map(profile: Profile) -> Figure:
    """Share of slots of every layer and head; beside it the policies, or the thresholds where all heads have one."""
    plan = profile.plan
    share = np.array([[head.share for head in layer.heads] for layer in plan.layers])
    figure = Figure(figsize=(9, max(3.0, 0.22 * len(plan.layers) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [layer.layer for layer in plan.layers]
    common = {"yticklabels": labels, "annot": share.shape[1] <= 8, "annot_kws": {"fontsize": 7}}
    sns.heatmap(share, ax=left, vmin=0, vmax=1, cmap="cividis", fmt=".2f", cbar_kws={"label": "share"}, **common)
    left.set_title("share of tokens that keep a slot", fontsize=10)
    names = [[head.policy for head in layer.heads] for layer in plan.layers]
    policies = sorted({name for row in names for name in row})
    if len(policies) > 1:
        colours = sns.color_palette("colorblind", len(policies))
        index = np.array([[policies.index(name) for name in row] for row in names])
        sns.heatmap(
            index,
            ax=right,
            cmap=ListedColormap(colours),
            cbar=False,
            vmin=-0.5,
            vmax=len(policies) - 0.5,
            yticklabels=labels,
        )
        patches = [Patch(color=colour, label=name) for name, colour in zip(policies, colours, strict=True)]
        right.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
        right.set_title("policy", fontsize=10)
    else:
        epsilon = np.array(
            [[np.nan if head.epsilon is None else head.epsilon for head in layer.heads] for layer in plan.layers]
        )
        sns.heatmap(
            epsilon, ax=right, vmin=0, vmax=1, cmap="viridis", fmt=".2f", cbar_kws={"label": "epsilon"}, **common
        )
        right.set_title(f"threshold epsilon ({policies[0]})", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("KV head")
        axis.set_ylabel("layer")
        axis.tick_params(axis="y", rotation=0)
    figure.suptitle(f"{profile.model.name}: plan for budget {plan.budget:g}")
    return figure


def distance_curves(distances: NDArray[Any], similarity: NDArray[Any], layers: list[int], heads: list[int]) -> Figure:
    """Mean key similarity against distance in tokens."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis = figure.subplots()
    # Beyond, a distance is the mean of few pairs, all with the text's first tokens.
    shown = distances <= 0.9 * distances.max()
    colours = sns.color_palette("viridis", len(layers))
    for layer, colour in zip(layers, colours, strict=True):
        for head, style in zip(heads, ("-", "--", ":", "-.") * len(heads), strict=False):
            axis.plot(
                distances[shown],
                similarity[layer, head][shown],
                style,
                color=colour,
                linewidth=1,
                label=f"{layer} / {head}",
            )
    axis.set_xscale("log")
    axis.set_xlabel("distance in tokens")
    axis.set_ylabel("mean cosine of keys")
    axis.set_title("Key similarity against distance")
    axis.legend(title="layer / head", fontsize=7, title_fontsize=8, frameon=False, ncols=2)
    sns.despine(ax=axis)
    return figure


def _layer_colourbar(figure: Figure, axis: Axes, layers: int) -> None:
    mappable = ScalarMappable(Normalize(0, layers - 1), "viridis")
    figure.colorbar(mappable, ax=axis, label="layer")
