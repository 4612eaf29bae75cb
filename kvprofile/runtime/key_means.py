"""The means by which keys are centred before they are packed: measured when the model was calibrated."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.codecs.table import CODECS
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.profile.measured_arrays import UNCENTRED
from kvprofile.profile.profile import Profile

if TYPE_CHECKING:
    import numpy as np


def key_means(profile: Profile, arrays: "Mapping[str, np.ndarray] | None") -> dict[int, Tensor]:
    """`(kv_heads, head_dim)` float32 for every layer that centres keys, by its index.

    Raises MismatchError for a codec that this program does not have, KVProfileError where the means are not at hand or not of
    the model's shape.
    """
    pairs = profile.plan.codecs
    if unknown := {name for heads in pairs.values() for pair in heads for name in pair} - CODECS.keys():
        raise MismatchError(
            f"the profile's codec {min(unknown)} cannot be run here; import the program that registers it first"
        )
    centred = [layer for layer, heads in pairs.items() if any(key not in UNCENTRED for key, _ in heads)]
    if not centred:
        return {}
    means = _at_hand(profile, arrays)
    facts = profile.model
    expected = (facts.layers, facts.kv_heads, facts.head_dim)
    if means.shape != expected:
        raise MismatchError(f"key_mean is {means.shape}, and the model needs {expected}; calibrate anew")
    return {layer: torch.tensor(means[layer], dtype=torch.float32) for layer in centred}


def _at_hand(profile: Profile, arrays: "Mapping[str, np.ndarray] | None") -> "np.ndarray":
    if arrays is None:
        try:
            arrays = profile.arrays()
        except KVProfileError as error:
            raise KVProfileError(
                "the plan packs keys, which are centred by means in the profile's arrays, and those are not at hand: give the "
                f"path of the profile, its .safetensors beside it, or pass arrays= ({error})"
            ) from error
    if "key_mean" not in arrays:
        raise KVProfileError(
            "the plan packs keys, and the profile's arrays hold no key_mean to centre them by; calibrate anew"
        )
    return arrays["key_mean"]
