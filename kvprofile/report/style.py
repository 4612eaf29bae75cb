"""The look of every figure, and how one becomes SVG for a page with two themes, SVG for a file, or PNG.

Figures are drawn once, in the colours of the light theme. On a page each of those colours is replaced by CSS `light-dark()`
with its counterpart, so that one drawing serves both themes; the cells of heatmaps keep their scale.
"""

import base64
import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDE, NARROW = 900, 380  # pixels: beside a margin on a laptop, and a phone
PNG_DPI = 160

INK, MUTED, RULE, FAINT = "#1d2329", "#5c6770", "#c9cfd4", "#e8ebed"
ACCENT, RIVAL = "#0b6e99", "#b35900"
DARK = {
    INK: "#e6e9ec",
    MUTED: "#9aa5af",
    RULE: "#454e57",
    FAINT: "#252b31",
    ACCENT: "#5bb8e0",
    RIVAL: "#f0a04b",
}
RAMP = 64  # steps of the ramp from the first layer to the last

_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "grid.color": FAINT,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvprofile",
}


class Plot(Figure):
    """A figure that notebooks show of themselves: pyplot, which keeps every figure alive, is not needed."""

    def _repr_png_(self) -> bytes:
        return png(self)


@contextmanager
def drawing() -> Iterator[None]:
    """The house settings, for as long as a figure is drawn; the caller's own matplotlib settings stay untouched."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_plot(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Plot:
    """An empty figure of so many pixels; without a layout, axes are placed by hand."""
    return Plot(figsize=(width / 72, height / 72), layout=layout)


def ramp(place: float) -> str:
    """Colour of a place from 0, the first layer, to 1, the last."""
    return _ramp(0.0, 0.82)[round(place * (RAMP - 1))]


def clean(axis: Axes) -> None:
    """No spines and no ticks, for maps."""
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def part(kind: str, name: str | int) -> str:
    """An id for a drawn element; on a page it becomes the attribute `data-KIND="NAME"`, for its script to find."""
    return f"data-{kind}.{name}"


def png(figure: Figure, dpi: int = PNG_DPI) -> bytes:
    """The figure on white, for files and notebooks."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, facecolor="white")
    return stream.getvalue()


def svg(figure: Figure) -> str:
    """The figure as a file of its own, its text as text."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvprofile"}):
        figure.savefig(stream, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure for a page: in both themes' colours, in the page's font, its ids made unique by `name`."""
    text = svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|\sxmlns(?::\w+)?=\"[^\"]*\"|font-family: [^;\"]*;? ?", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\sid="data-(\w+)\.([^"]+)"', r' data-\1="\2"', text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{name}-{m.group(1)}"' if m.group(1) in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r'(?<=\sd=")[^"]*', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group()).replace("\n", ""), text)
    text = re.sub(r"(?<=data:image/png;base64,)[^\"]*", lambda m: _paletted(m.group()), text)
    themes = {**DARK, **dict(zip(_ramp(0.0, 0.82), _ramp(0.26, 1.0), strict=True))}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _both(m.group(), themes), text)
    return re.sub(
        r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>',
        lambda m: (
            f'<svg viewBox="0 0 {m.group(1)} {m.group(2)}" style="max-width:{float(m.group(1)):g}px" role="img" '
            f'aria-label="{html.escape(label)}">'
        ),
        text,
        count=1,
    )


def _paletted(encoded: str) -> str:
    """The same PNG in base64, a byte a pixel where that is shorter and colours are few: matplotlib writes four."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))
    # One number a pixel sorts many times faster than a row of four, and in the same order.
    packed, index = np.unique(np.ascontiguousarray(pixels).view(">u4").astype(np.uint32), return_inverse=True)
    if len(packed) > 256:
        return encoded.replace("\n", "")
    colours = packed.astype(">u4").view(np.uint8).reshape(-1, 4)
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours[:, :3].tobytes())
    stream = io.BytesIO()
    image.save(stream, format="png", optimize=True, transparency=colours[:, 3].tobytes())
    return min(encoded.replace("\n", ""), base64.b64encode(stream.getvalue()).decode(), key=len)


def _both(colour: str, themes: dict[str, str]) -> str:
    return f"light-dark({colour},{themes[colour]})" if colour in themes else colour


def _ramp(low: float, high: float) -> list[str]:
    colours = matplotlib.colormaps["viridis"](np.linspace(low, high, RAMP))
    return [matplotlib.colors.to_hex(colour) for colour in colours]
