"""Similarity of keys, token by token: chosen heads as in KVMerger's Fig. 2 (arXiv 2407.08454), and all heads at once."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from numpy.typing import NDArray

from kvprofile.report.style import MUTED, NARROW, Plot, clean, drawing, new_plot

MARGIN = 46
WALL_PIXELS = 450_000  # what the wall may weigh: beyond, maps are pooled 2 x 2


def similarity_maps(maps: NDArray[np.generic], chosen: Sequence[tuple[int, int]], tokens: int, width: int) -> Plot:
    """Lower triangles of the similarity maps of the chosen layers and heads, over `tokens` tokens, on one scale."""
    columns = min(len(chosen), 3 if width > NARROW else 2)
    rows = -(-len(chosen) // columns)
    tile = min((width - 20) / columns, 300)
    low = lowest(maps)
    with drawing():
        plot = new_plot(width, rows * (tile + 8) + 84)
        axes = plot.subplots(rows, columns, squeeze=False).ravel()
        for place, (axis, (layer, head)) in enumerate(zip(axes, chosen, strict=False)):
            cells = maps[layer, head].astype(np.float32)
            _show(axis, np.where(np.tri(len(cells)) > 0, cells, np.nan), low, colours=256)
            bottom = place + columns >= len(chosen)
            _token_axes(axis, tokens, len(cells), left=place % columns == 0, bottom=bottom)
            # In the empty half of the square.
            label = f"layer {layer}\nhead {head}"
            axis.text(0.98, 0.97, label, transform=axis.transAxes, ha="right", va="top", linespacing=1.4)
        for axis in axes[len(chosen) :]:
            axis.set_visible(False)
        _scale(plot, axes, low)
    return plot


def similarity_wall(maps: NDArray[np.generic], layers: Sequence[int], width: int) -> Plot:
    """The maps of every head: a column for each layer, its heads one below the other."""
    cells = maps[list(layers)].astype(np.float32)
    while cells[..., 0].size * cells.shape[-1] > WALL_PIXELS and cells.shape[-1] % 2 == 0:
        cells = cells.reshape(*cells.shape[:2], cells.shape[2] // 2, 2, cells.shape[3] // 2, 2).mean(axis=(3, 5))
    count, heads, size = cells.shape[:3]
    low = lowest(cells)
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
            _show(axis, mosaic, low, colours=80)
            axis.set_anchor("W")
            centre = size / 2 - 0.5
            every = math.ceil(20 / tile)
            axis.set_xticks([column * step + centre for column in range(0, len(part), every)], part[::every])
            every = math.ceil(12 / tile)
            axis.set_yticks([head * step + centre for head in range(0, heads, every)], range(0, heads, every))
            axis.tick_params(labeltop=True, labelbottom=False)
            axis.set_ylabel("KV head")
        axes[0].set_title("layer", loc="left", color=MUTED, fontsize=10)
        _scale(plot, axes, low)
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


def lowest(maps: NDArray[np.generic]) -> float:
    """Where the scale begins: at 0 where no cosine of the lower triangles is below it, otherwise at -1."""
    cells = maps.astype(np.float32)[..., np.tri(maps.shape[-1]) > 0]
    return 0.0 if np.nanmin(cells, initial=1.0) >= 0 else -1.0


def _colours(low: float, count: int = 256) -> ListedColormap:
    """White at 0, red above and, on a scale of two sides, blue below."""
    return ListedColormap(colormaps["RdBu_r"](np.linspace((low + 1) / 2, 1, count)))


def _show(axis: Axes, cells: NDArray[np.floating], low: float, colours: int) -> None:
    axis.imshow(cells, norm=Normalize(low, 1), cmap=_colours(low, colours), interpolation="none")
    clean(axis)
    axis.set_xticks([])
    axis.set_yticks([])


def _token_axes(axis: Axes, tokens: int, size: int, *, left: bool, bottom: bool) -> None:
    """The first and the last token on the axes at the outside of a block of maps of `size` cells."""
    ends, labels = [-0.5, size - 0.5], ["0", f"{tokens:,}"]
    if left:
        axis.set_yticks(ends, labels)
        axis.set_ylabel("token")
        first, last = axis.get_yticklabels()
        first.set_verticalalignment("top")
        last.set_verticalalignment("bottom")
    if bottom:
        axis.set_xticks(ends, labels)
        axis.set_xlabel("earlier token")
        first, last = axis.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")


def _scale(plot: Plot, axes: NDArray[np.object_], low: float) -> None:
    bar = plot.colorbar(
        ScalarMappable(Normalize(low, 1), _colours(low)),
        ax=list(axes),
        location="bottom",
        aspect=40,
        shrink=0.6,
        fraction=0.05,
        pad=0.02,
        label="cosine of keys",
        ticks=np.linspace(low, 1, 5).tolist(),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
