"""All that is measured in one calibration run, as one accumulator."""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from kvprofile.calibration.measure.adjacent import AdjacentSimilarity
from kvprofile.calibration.measure.codec_damage import CodecDamage
from kvprofile.calibration.measure.coverage import MassCoverage
from kvprofile.calibration.measure.damage import DamageCurves
from kvprofile.calibration.measure.distance import SimilarityByDistance
from kvprofile.calibration.measure.hidden import AttentionChange
from kvprofile.calibration.measure.key_mean import KeyMean
from kvprofile.calibration.measure.maps import SimilarityMap
from kvprofile.calibration.measure.ratios import CompressionRatios
from kvprofile.calibration.measure.window import WindowAttention, window_attention
from kvprofile.calibration.measure.window_damage import WindowDamage
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.scores import estimated_mass
from kvprofile.merging.sets import SET_RULES
from kvprofile.merging.tokens import Tokens
from kvprofile.runtime.attention import AttentionCall


class Measurements:
    """Key similarity in every form, the compression ratios under a policy's protected tokens, and what budget rules go by.

    With `rules` empty only the similarity measures are taken, which cost next to nothing. `damage` holds the damage curves
    of the full-attention layers, where they are measured, `codecs` what storing their slots in fewer bits costs,
    `windows` what that costs the tokens of sliding layers, and `key_mean` by what keys are centred then.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        tokens: int,
        policy: Policy,
        *,
        rules: tuple[str, ...] = SET_RULES,
        damage: DamageCurves | None = None,
        codecs: CodecDamage | None = None,
        key_mean: KeyMean | None = None,
        windows: WindowDamage | None = None,
    ) -> None:
        self.policy = policy
        self.damage, self.codecs, self.key_mean, self.windows = damage, codecs, key_mean, windows
        self.adjacent = AdjacentSimilarity(layers, kv_heads)
        self.distance = SimilarityByDistance(layers, kv_heads, tokens)
        self.map = SimilarityMap(layers, kv_heads)
        self.ratios = CompressionRatios(layers, kv_heads, rules)
        self.coverage = MassCoverage(layers)
        self.window = WindowAttention(layers)
        self.change = AttentionChange(layers)

    def update(self, layer: int, kind: str, call: AttentionCall, mass: torch.Tensor | None = None) -> None:
        """Add one sample's layer: the call of a prefill with batch 1.

        The attention `mass` `(1, kv_heads, tokens)` is given for the layers that are merged: budget rules go by these alone.
        """
        keys, values = call.key[0], call.value[0]
        self.adjacent.update(layer, keys, values)
        self.distance.update(layer, keys)
        self.map.update(layer, keys)
        if self.key_mean is not None:
            self.key_mean.update(layer, keys)
        if mass is not None:
            self.coverage.update(layer, mass[0])
            attention = window_attention(call.query, call.key, call.softmax)
            self.window.update(layer, attention)
        if not self.ratios.rules:
            return
        protection, tokens = self.policy.protection, keys.shape[1]
        recent = protection.recent_tokens(tokens)
        heavy = protection.heavy_tokens(tokens)
        if heavy and mass is None:
            mass = estimated_mass(call.query, call.key, call.softmax)
        aged = Tokens(call.key, call.value, mass, {}, 0, tokens).oldest(tokens - recent)
        protected = protected_tokens(protection, aged, heavy)[0]
        self.ratios.update(layer, kind, aged.keys[0], protected, apart=recent)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that hold all that was seen, by accumulator and name: what is kept on disk."""
        states = {
            "adjacent": self.adjacent.state(),
            "distance": self.distance.state(),
            "map": self.map.state(),
            "ratios": self.ratios.state(),
            "coverage": self.coverage.state(),
            "window": self.window.state(),
            "change": self.change.state(),
            **{name: part.state() for name, part in self._asked().items()},
        }
        return {f"{part}/{name}": array for part, state in states.items() for name, array in state.items()}

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.adjacent.merge(other.adjacent)
        self.distance.merge(other.distance)
        self.map.merge(other.map)
        self.ratios.merge(other.ratios)
        self.coverage.merge(other.coverage)
        self.window.merge(other.window)
        self.change.merge(other.change)
        theirs = other._asked()
        for name, part in self._asked().items():
            part.merge(theirs[name])

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Every array, by the names each accumulator documents."""
        return {
            **self.adjacent.finish(),
            **self.distance.finish(),
            **self.map.finish(),
            **self.ratios.finish(),
            **self.coverage.finish(),
            **self.window.finish(),
            **self.change.finish(),
            **{name: array for part in self._asked().values() for name, array in part.finish().items()},
        }

    def _asked(self) -> dict[str, Any]:
        """What is measured only where it is asked for, by name."""
        parts = {"damage": self.damage, "codecs": self.codecs, "key_mean": self.key_mean, "windows": self.windows}
        return {name: part for name, part in parts.items() if part is not None}
