"""How the report writes numbers."""

import numpy as np


def number(value: float | None) -> str:
    """Two significant digits, a dash for nothing."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.2g}".removesuffix(".").replace("e-0", "e-")


def percent(value: float | None) -> str:
    """One digit after the point, a dash for nothing."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.1%}"


def rough(value: float) -> str:
    """A share as one says it: whole percent, and one digit after the point below 2%."""
    return f"{value:.1%}" if 0 < value < 0.02 else f"{value:.0%}"


def size(nbytes: int | None) -> str:
    """Bytes in the unit one would say them in."""
    if nbytes is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def count(number: int, thing: str) -> str:
    """So many things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
