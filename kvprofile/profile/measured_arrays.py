"""What the arrays beside a profile must be: their names, shapes and kinds of numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvprofile.errors import KVProfileError

if TYPE_CHECKING:
    import numpy as np

    from kvprofile.profile.profile import Profile

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
    "key_codec_damage": ("merged", "codec_policies", "kv_heads", "codec_shares", "codecs", "kinds"),
    "value_codec_damage": ("merged", "codec_policies", "kv_heads", "codec_shares", "codecs", "kinds"),
    "key_window_damage": ("windows", "kv_heads", "codecs", "kinds"),
    "value_window_damage": ("windows", "kv_heads", "codecs", "kinds"),
    "key_mean": ("layers", "kv_heads", "head_dim"),
} | {
    f"ratio_{part}.{rule}": ("layers", "kv_heads", "thresholds")
    for part in ("mean", "std")
    for rule in ("chain", "anchor", "complete")
}
UNCENTRED = ("none", "bfloat16", "float16")  # codecs to which a mean makes no difference
ALWAYS = ("key_histogram", "value_histogram", "distances", "similarity_by_distance", "similarity_map")
DAMAGE = ("damage_mean", "damage_std")
CODEC_DAMAGE = ("key_codec_damage", "value_codec_damage")
WINDOW_DAMAGE = ("key_window_damage", "value_window_damage")


def check_arrays(profile: "Profile", arrays: "Mapping[str, np.ndarray]", file: Path) -> None:
    """Raise KVProfileError where the arrays in `file` are not what the profile says was measured.

    Names that are not known are let be: a later version may have measured more.
    """
    import numpy as np

    damage = profile.statistics.damage
    needed = [*ALWAYS, *(() if damage is None else DAMAGE)]
    if damage is not None and damage.codecs:
        needed += [*CODEC_DAMAGE, "key_mean", *(WINDOW_DAMAGE if damage.windows else ())]
    if missing := [name for name in needed if name not in arrays]:
        raise KVProfileError(
            f"{file} holds no {', '.join(missing)}, which the profile says was measured; calibrate anew"
        )
    if "key_mean" not in arrays and (codecs := centring(profile)):
        raise KVProfileError(
            f"{file} holds no key_mean, by which keys are centred before {', '.join(codecs)} stores them; calibrate anew"
        )
    sizes = {
        "layers": profile.model.layers,
        "kv_heads": profile.model.kv_heads,
        "head_dim": profile.model.head_dim,
        "merged": len(profile.attention_layers()),
        "thresholds": len(profile.statistics.thresholds),
    }
    if damage is not None:
        sizes |= {"policies": len(damage.policies), "budgets": len(damage.budgets), "kinds": len(damage.kinds)}
        if damage.codecs:
            sizes |= {"codec_policies": len(damage.codec_policies), "codec_shares": len(damage.codec_shares)}
            sizes |= {"codecs": len(damage.codecs), "windows": len(damage.windows)}
    for name, letters in SHAPES.items():
        if name in arrays:
            _check_shape(f"{file}: {name}", arrays[name], letters, sizes)
            harm = name in (*DAMAGE, *CODEC_DAMAGE, *WINDOW_DAMAGE)
            if harm and not (np.isfinite(arrays[name]).all() and (arrays[name] >= 0).all()):
                raise KVProfileError(f"{file}: {name} holds numbers that no damage can have; calibrate anew")
            if name == "key_mean" and not np.isfinite(arrays[name]).all():
                raise KVProfileError(f"{file}: {name} holds numbers that no mean can have; calibrate anew")


def centring(profile: "Profile") -> list[str]:
    """The plan's codecs that centre keys."""
    used = {key for heads in profile.plan.codecs.values() for key, _ in heads}
    return sorted(used - set(UNCENTRED))


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
