"""How a layer with a sliding window is stored: the part of a profile that its cache needs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from kvprofile.errors import KVProfileError
from kvprofile.profile.profile import Profile


@dataclass(frozen=True)
class WindowSetting:
    """How one sliding layer is stored.

    window: tokens a query sees, its own among them. codecs: of each KV head's keys and values, by name. key_mean
    `(kv_heads, head_dim)` float32: what keys are centred by where a codec centres them.
    """

    window: int
    codecs: tuple[tuple[str, str], ...]
    key_mean: Tensor | None = None
    keeps_all: ClassVar[bool] = False

    @cached_property
    def groups(self) -> tuple[tuple[tuple[str, str], tuple[int, ...]], ...]:
        """Every pair of codecs with the KV heads that are stored by it."""
        heads: dict[tuple[str, str], list[int]] = {}
        for head, pair in enumerate(self.codecs):
            heads.setdefault(pair, []).append(head)
        return tuple((pair, tuple(found)) for pair, found in heads.items())


def window_settings(profile: Profile, means: Mapping[int, Tensor]) -> dict[int, WindowSetting]:
    """The setting of every layer whose window the profile packs; `means` are the keys', by layer."""
    window = profile.model.window
    if window is None:
        return {}
    return {
        plan.layer: WindowSetting(
            window, tuple((head.key_codec, head.value_codec) for head in plan.heads), means.get(plan.layer)
        )
        for plan in profile.plan.windows
    }


def check_windows(windows: Mapping[int, WindowSetting], layers: Collection[int]) -> None:
    """Raise KVProfileError where a window is to be packed of none of the `layers` that can be followed."""
    if lost := sorted(windows.keys() - set(layers)):
        raise KVProfileError(
            f"the attention of this model's sliding layers {lost} cannot be followed, so their windows cannot be packed; plan "
            "with --codec none"
        )
