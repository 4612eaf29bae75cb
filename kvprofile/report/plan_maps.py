"""The plan as maps of layers and heads: slots kept, bits of a number, and the policy or the threshold of every head."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from kvprofile.names import NO_CODEC
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import HeadPlan, WindowHead
from kvprofile.report.style import FAINT, NARROW, Plot, clean, drawing, new_plot, part

Colour = tuple[float, ...]

LEFT, TOP, BELOW = 44, 4, 38  # pixels around a map: labels on the left and below it
BAR = 52  # pixels for a colour bar, its ticks and its label
LEGEND_ROW = 18
SCALE = "cividis"  # of the slots' map
WHOLE = 16  # bits of a number that no codec packs, as most models are served
BITS = (2.0, float(WHOLE))  # ends of the bits' map
# seaborn's palette "colorblind", written down: to import seaborn takes longer than to draw a map.
COLOURS = (
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#949494",
    "#ece133",
    "#56b4e9",
)


def slots_map(profile: Profile, width: int) -> Plot:
    """Share of the tokens that keep a slot in every head."""
    shares = _grid(profile, lambda head: head.share)
    return _scale_map(shares, width, "slots kept", SCALE)


def thresholds_map(profile: Profile, width: int) -> Plot:
    """Threshold epsilon of every head, where every head goes by one policy."""
    epsilon = _grid(profile, lambda head: 1.0 if head.epsilon is None else head.epsilon)
    return _scale_map(epsilon, width, "threshold ε (1: nothing merges)", "viridis")


def policies_map(profile: Profile, width: int, names: Sequence[str]) -> Plot:
    """Policy of every head, as a colour and a letter; `names` get theirs in this order.

    The legend lists the policies in use and those that the solver could have chosen.
    """
    names = list(names)
    chosen = _grid(profile, lambda head: float(names.index(head.policy)))
    colours = policy_colours(len(names))
    used = Counter(head.policy for layer in profile.plan.layers for head in layer.heads)
    listed = [index for index, name in enumerate(names) if used[name] or name in candidates(profile)]
    columns = 5 if width > NARROW else 2
    with drawing():
        plot, axis, cell = _frame(chosen.shape, width, LEGEND_ROW * -(-len(listed) // columns) + 8)
        for place, index in np.ndenumerate(chosen):
            shown = None if np.isnan(index) else (colours[int(index)], letter(int(index)))
            _cell(axis, place, shown, width, size=min(10, min(cell) - 2))
        handles = [
            Patch(color=colours[index], label=f"{letter(index)}  {names[index]} ({used[names[index]]})")
            for index in listed
        ]
        legend = plot.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=((LEFT - 6) / width, 0),
            ncols=columns,
            handlelength=1,
            borderpad=0,
            columnspacing=1.2,
        )
        for number, text in zip(listed, legend.get_texts(), strict=True):
            text.set_gid(part("legend", number))
    return plot


def bits_map(profile: Profile, width: int) -> Plot:
    """Bits that a number of a key and of a value takes in every head, in its codec's name: `keys/values`."""
    mean = _grid(profile, _mean_bits)
    texts: dict[tuple[int, ...], str] = {}
    for layer in profile.plan.windows:
        mean[layer.layer] = [_mean_bits(head) for head in layer.heads]
    for number, pairs in profile.plan.codecs.items():
        texts |= {(number, index): bits_of_pair(*pair) for index, pair in enumerate(pairs)}
    return _scale_map(mean, width, "bits of a number, mean of keys and values", SCALE, ends=BITS, texts=texts)


def _mean_bits(head: HeadPlan | WindowHead) -> float:
    return (bits_of(head.key_codec) + bits_of(head.value_codec)) / 2


def bits_of_pair(key_codec: str, value_codec: str) -> str:
    """`6/4`: 6 bits a number of a key, 4 of a value; one number where they are alike."""
    keys, values = bits_of(key_codec), bits_of(value_codec)
    return str(keys) if keys == values else f"{keys}/{values}"


def bits_of(codec: str) -> int:
    """The bits in a codec's name; of a foreign name without any, and of no codec, `WHOLE`."""
    found = None if codec == NO_CODEC else re.search(r"\d+", codec)
    return WHOLE if found is None else min(int(found[0]), WHOLE)


def difference_map(first: Profile, second: Profile, width: int) -> Plot | None:
    """What the second plan's share is above the first's in every head; None where the two have not the same heads."""
    shares = [_grid(profile, lambda head: head.share) for profile in (first, second)]
    if shares[0].shape != shares[1].shape or (np.isnan(shares[0]) != np.isnan(shares[1])).any():
        return None
    change = shares[1] - shares[0]
    most = float(np.nanmax(np.abs(change))) or 1.0
    return _scale_map(change, width, "share of the second less the first's", "RdBu", ends=(-most, most))


def policy_names(profiles: Sequence[Profile]) -> list[str]:
    """Every policy that a head of these profiles follows, the most frequent first, then those they could have chosen."""
    counts = Counter(head.policy for profile in profiles for layer in profile.plan.layers for head in layer.heads)
    counts.update({name: 0 for profile in profiles for name in candidates(profile)})
    return sorted(counts, key=lambda name: (-counts[name], name))


def candidates(profile: Profile) -> list[str]:
    """The policies among which damage chooses, by the plan's own setting; none where no damage was measured."""
    measured = profile.statistics.damage
    if measured is None:
        return []
    return [profile.plan.policy] if profile.plan.policy in measured.policies else list(measured.policies)


def policy_colours(count: int) -> list[Colour]:
    """Colours that stay apart for colour-blind eyes; past the tenth they come lighter, then darker, told apart by letters."""
    base = [to_rgb(colour) for colour in COLOURS]
    lighter = [tuple(0.45 * part + 0.55 for part in colour) for colour in base]
    darker = [tuple(0.55 * part for part in colour) for colour in base]
    cycle = [*base, *lighter, *darker]
    return [cycle[index % len(cycle)] for index in range(count)]


def letter(index: int) -> str:
    """A, B, ... Z, a, b, ..."""
    return chr(ord("A") + index) if index < 26 else chr(ord("a") + index - 26)


def _grid(profile: Profile, value: Callable[[HeadPlan], float]) -> NDArray[np.float64]:
    """`(layers, kv_heads)`, NaN in the layers that are not merged."""
    grid = np.full((profile.model.layers, profile.model.kv_heads), np.nan)
    for layer in profile.plan.layers:
        grid[layer.layer] = [value(head) for head in layer.heads]
    return grid


def _scale_map(
    values: NDArray[np.float64],
    width: int,
    label: str,
    scale: str,
    *,
    ends: tuple[float, float] = (0.0, 1.0),
    texts: Mapping[tuple[int, ...], str] | None = None,
) -> Plot:
    """A map in the colours of `scale` between `ends`, in each cell its text or else its value where they can be read."""
    low, high = ends
    with drawing():
        plot, axis, cell = _frame(values.shape, width, BAR)
        readable = cell[0] >= 24 and cell[1] >= 11
        for place, value in np.ndenumerate(values):
            text = "" if not readable else _short(value, signed=low < 0) if texts is None else texts.get(place, "")
            colour = tuple(colormaps[scale](float(np.nan_to_num((value - low) / (high - low)))))
            _cell(axis, place, None if np.isnan(value) else (colour, text), width, size=10)
        height = plot.get_figheight() * 72
        length = min(320, width - LEFT)
        bar = plot.add_axes((LEFT / width, (BAR - 18) / height, length / width, 9 / height))
        bar.imshow(
            np.linspace(0, 1, 128)[None], cmap=scale, aspect="auto", extent=(low, high, 0, 1), interpolation="none"
        )
        clean(bar)
        bar.set_yticks([])
        bar.set_xlabel(label)
    return plot


def _short(value: float, *, signed: bool) -> str:
    """Two digits after the point, without the zero before it."""
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _frame(shape: tuple[int, ...], width: int, extra: float) -> tuple[Plot, Axes, tuple[float, float]]:
    """An empty map with layers across (down, on a narrow page), room below, and the size of a cell in pixels."""
    across, down = shape if width > NARROW else shape[::-1]
    # Tall enough to read a number in, and the whole no taller than the page is wide.
    cell_width = min((width - LEFT - 2) / across, 110)
    cell_height = max(6.0, min(30 if width > NARROW else 17, max(cell_width, 11), width / down))
    cell_height = max(cell_height, 52 / down)  # the axis label needs as much
    height = down * cell_height + TOP + BELOW + extra
    plot = new_plot(width, height, layout=None)
    box = (LEFT, BELOW + extra, across * cell_width, down * cell_height)
    axis = plot.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    clean(axis)
    axis.set_xlim(-0.5, across - 0.5)
    axis.set_ylim(down - 0.5, -0.5)
    axis.set_xlabel("layer" if width > NARROW else "KV head")
    axis.set_ylabel("KV head" if width > NARROW else "layer")
    axis.set_xticks(_ticks(across, cell_width, 18))
    axis.set_yticks(_ticks(down, cell_height, 11))
    return plot, axis, (cell_width, cell_height)


def _ticks(count: int, cell: float, label: float) -> list[int]:
    """Every cell, or every second, fifth, ... so that labels of that many pixels do not touch."""
    step = next(step for step in (1, 2, 5, 10, 20, 50) if step * cell >= label or step == 50)
    return list(range(0, count, step))


def _cell(axis: Axes, place: tuple[int, ...], shown: tuple[Colour, str] | None, width: int, size: float) -> None:
    """A square with a hair of space around it and a text in it; faint where the layer is not merged.

    The page's script finds both by layer and head.
    """
    x, y = place if width > NARROW else place[::-1]
    layer, head = place
    colour, text = shown if shown is not None else (to_rgb(FAINT), "")
    fill = FAINT if shown is None else colour
    # Not add_patch, which makes the axes' limits fit: these are set, and a large map has a thousand squares.
    square = axis.add_artist(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=fill, linewidth=0))
    square.set_gid(part("cell", f"{layer}-{head}"))
    if text and size >= 6:
        red, green, blue = colour[:3]
        # The same in both themes, as the cell is.
        ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#101418"
        label = axis.text(x, y, text, ha="center", va="center_baseline", fontsize=size, color=ink)
        label.set_gid(part("label", f"{layer}-{head}"))
