"""Similarity of keys, token by token: chosen heads as in KVMerger's Fig. 2 (arXiv 2407.08454), and all heads at once."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from kvprofile.report.style import MUTED, NARROW, Plot, clean, drawing, new_plot

MARGIN = 46
WALL_PIXELS = 450_000  # what the wall may weigh: beyond, maps are pooled 2 x 2


def similarity_maps(maps: NDArray[np.generic], chosen: Sequence[tuple[int, int]], width: int) -> Plot:
    """Lower triangles of the similarity maps of the chosen layers and heads, on one scale from -1 to 1."""
    columns = min(len(chosen), 3 if width > NARROW else 2)
    rows = -(-len(chosen) // columns)
    tile = min((width - 20) / columns, 300)
    with drawing():
        plot = new_plot(width, rows * (tile + 8) + 52)
        axes = plot.subplots(rows, columns, squeeze=False).ravel()
        for axis, (layer, head) in zip(axes, chosen, strict=False):
            cells = maps[layer, head].astype(np.float32)
            _show(axis, np.where(np.tri(len(cells)) > 0, cells, np.nan), colours=256)
            # In the empty half of the square.
            label = f"layer {layer}\nhead {head}"
            axis.text(0.98, 0.97, label, transform=axis.transAxes, ha="right", va="top", linespacing=1.4)
        for axis in axes[len(chosen) :]:
            axis.set_visible(False)
        _scale(plot, axes)
    return plot


def similarity_wall(maps: NDArray[np.generic], layers: Sequence[int], width: int) -> Plot:
    """The maps of every head: a column for each layer, its heads one below the other."""
    cells = maps[list(layers)].astype(np.float32)
    while cells[..., 0].size * cells.shape[-1] > WALL_PIXELS and cells.shape[-1] % 2 == 0:
        cells = cells.reshape(*cells.shape[:2], cells.shape[2] // 2, 2, cells.shape[3] // 2, 2).mean(axis=(3, 5))
    count, heads, size = cells.shape[:3]
    cells = np.where(np.tri(size) > 0, cells, np.nan)
    columns, tile = wall_columns(count, heads, width)
    blocks = -(-count // columns)
    with drawing():
        plot = new_plot(width, blocks * (heads * tile + 22) + 66)
        axes = plot.subplots(blocks, 1, squeeze=False).ravel()
        step = size + max(1, size // 10)
        for block, axis in enumerate(axes):
            mosaic = np.full((heads * step, columns * step), np.nan, dtype=np.float32)
            part = list(layers)[block * columns : (block + 1) * columns]
            for column in range(len(part)):
                for head in range(heads):
                    mosaic[head * step : head * step + size, column * step : column * step + size] = cells[
                        block * columns + column, head
                    ]
            # 80 colours compress to two thirds of what 256 weigh, and in small maps the eye tells no more apart.
            _show(axis, mosaic, colours=80)
            axis.set_anchor("W")
            centre = size / 2 - 0.5
            every = math.ceil(20 / tile)
            axis.set_xticks([column * step + centre for column in range(0, len(part), every)], part[::every])
            every = math.ceil(12 / tile)
            axis.set_yticks([head * step + centre for head in range(0, heads, every)], range(0, heads, every))
            axis.tick_params(labeltop=True, labelbottom=False)
            axis.set_ylabel("KV head")
        axes[0].set_title("layer", loc="left", color=MUTED, fontsize=10)
        _scale(plot, axes)
    return plot


def wall_columns(layers: int, heads: int, width: int) -> tuple[int, float]:
    """Layers side by side in a block, and the side of a map in pixels: as large as a page of fair length allows."""
    longest, largest = (620, 90) if width > NARROW else (1300, 60)

    def tile(columns: int) -> float:
        return (width - MARGIN) / columns

    fits = [
        columns
        for columns in range(1, layers + 1)
        if tile(columns) <= largest and -(-layers // columns) * heads * tile(columns) <= longest
    ]
    columns = fits[0] if fits else layers
    columns = -(-layers // -(-layers // columns))
    return columns, min(largest, tile(columns))


def _show(axis: Axes, cells: NDArray[np.floating], colours: int) -> None:
    axis.imshow(cells, norm=Normalize(-1, 1), cmap=colormaps["RdBu_r"].resampled(colours), interpolation="none")
    clean(axis)
    axis.set_xticks([])
    axis.set_yticks([])


def _scale(plot: Plot, axes: NDArray[np.object_]) -> None:
    bar = plot.colorbar(
        ScalarMappable(Normalize(-1, 1), "RdBu_r"),
        ax=list(axes),
        location="bottom",
        aspect=40,
        shrink=0.6,
        fraction=0.05,
        pad=0.02,
        label="cosine of keys",
        ticks=[-1, -0.5, 0, 0.5, 1],
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
