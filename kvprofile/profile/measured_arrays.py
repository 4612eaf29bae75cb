"""What the arrays beside a profile must be: their names, shapes and kinds of numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvprofile.errors import KVProfileError

if TYPE_CHECKING:
    import numpy as np

    from kvprofile.profile.schema import Profile

# Sizes that no field of the profile states; the same letter means the same size wherever it stands.
SHAPES: dict[str, tuple[str, ...]] = {
    "key_histogram": ("layers", "kv_heads", "bins"),
    "value_histogram": ("layers", "kv_heads", "bins"),
    "distances": ("distances",),
    "similarity_by_distance": ("layers", "kv_heads", "distances"),
    "similarity_map": ("layers", "kv_heads", "cells", "cells"),
    "mass_coverage": ("layers", "steps"),
    "window_entropy": ("layers",),
    "window_variance": ("layers",),
    "window_histogram": ("layers", "window_bins"),
    "attention_cosine": ("layers",),
    "damage_mean": ("merged", "policies", "kv_heads", "budgets", "kinds"),
    "damage_std": ("merged", "policies", "kv_heads", "budgets", "kinds"),
} | {
    f"ratio_{part}.{rule}": ("layers", "kv_heads", "thresholds")
    for part in ("mean", "std")
    for rule in ("chain", "anchor", "complete")
}
ALWAYS = ("key_histogram", "value_histogram", "distances", "similarity_by_distance", "similarity_map")
FINITE = ("damage_mean", "damage_std")


def check_arrays(profile: "Profile", arrays: "Mapping[str, np.ndarray]", file: Path) -> None:
    """Raise KVProfileError where the arrays in `file` are not what the profile says was measured.

    Names that are not known are let be: a later version may have measured more.
    """
    import numpy as np

    damage = profile.statistics.damage
    needed = [*ALWAYS, *(() if damage is None else FINITE)]
    if missing := [name for name in needed if name not in arrays]:
        raise KVProfileError(
            f"{file} holds no {', '.join(missing)}, which the profile says was measured; calibrate anew"
        )
    sizes = {
        "layers": profile.model.layers,
        "kv_heads": profile.model.kv_heads,
        "merged": len(profile.attention_layers()),
        "thresholds": len(profile.statistics.thresholds),
    }
    if damage is not None:
        sizes |= {"policies": len(damage.policies), "budgets": len(damage.budgets), "kinds": len(damage.kinds)}
    for name, letters in SHAPES.items():
        if name in arrays:
            _check_shape(f"{file}: {name}", arrays[name], letters, sizes)
            if name in FINITE and not (np.isfinite(arrays[name]).all() and (arrays[name] >= 0).all()):
                raise KVProfileError(f"{file}: {name} holds numbers that no damage can have; calibrate anew")


def _check_shape(what: str, array: "np.ndarray", letters: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Raise KVProfileError for another shape than `letters` of these `sizes`; sizes met for the first time join them."""
    if array.dtype.kind not in "fiu":
        raise KVProfileError(f"{what} holds {array.dtype}, not numbers; calibrate anew")
    shape = " x ".join(str(sizes.get(letter, letter)) for letter in letters)
    fits = array.ndim == len(letters) and all(
        sizes.setdefault(letter, size) == size for letter, size in zip(letters, array.shape, strict=True)
    )
    if not fits:
        raise KVProfileError(f"{what} is {array.shape}, and the profile needs {shape}; calibrate anew")
    if not array.size:
        raise KVProfileError(f"{what} is empty; calibrate anew")
