"""All that is measured in one calibration run, as one accumulator."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from kvprofile.measure.adjacent import AdjacentSimilarity
from kvprofile.measure.damage import DamageCurves
from kvprofile.measure.distance import SimilarityByDistance
from kvprofile.measure.maps import SimilarityMap
from kvprofile.measure.ratios import CompressionRatios
from kvprofile.merging.affinity import Tokens
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import protected_tokens
from kvprofile.merging.scores import MASS_STRIDE, attention_mass
from kvprofile.merging.sets import RULES
from kvprofile.runtime.attention import AttentionCall


class Statistics:
    """Key similarity in every form, and the compression ratios under a policy's protected tokens.

    With `rules` empty only the similarity measures are taken, which cost next to nothing. `damage` holds the damage curves
    of the full-attention layers, where they are measured.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        tokens: int,
        policy: Policy,
        *,
        rules: tuple[str, ...] = RULES,
        damage: DamageCurves | None = None,
    ) -> None:
        self.policy = policy
        self.damage = damage
        self.adjacent = AdjacentSimilarity(layers, kv_heads)
        self.distance = SimilarityByDistance(layers, kv_heads, tokens)
        self.map = SimilarityMap(layers, kv_heads)
        self.ratios = CompressionRatios(layers, kv_heads, rules)

    def update(self, layer: int, kind: str, call: AttentionCall) -> None:
        """Add one sample's layer: the call of a prefill with batch 1."""
        keys, values = call.key[0], call.value[0]
        self.adjacent.update(layer, keys, values)
        self.distance.update(layer, keys)
        self.map.update(layer, keys)
        if not self.ratios.rules:
            return
        protection, tokens = self.policy.protection, keys.shape[1]
        recent = protection.recent_tokens(tokens)
        heavy = protection.heavy_tokens(tokens)
        mass: torch.Tensor | None = None
        if heavy:
            mass = attention_mass(call.query, call.key, call.scaling, stride=MASS_STRIDE, softcap=call.softcap)
        aged = Tokens(call.key, call.value, mass, {}, 0, tokens).oldest(tokens - recent)
        protected = protected_tokens(protection, aged, heavy)[0]
        self.ratios.update(layer, kind, aged.keys[0], protected, apart=recent)

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen."""
        self.adjacent.merge(other.adjacent)
        self.distance.merge(other.distance)
        self.map.merge(other.map)
        self.ratios.merge(other.ratios)
        if self.damage is not None and other.damage is not None:
            self.damage.merge(other.damage)

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Every array, by the names each accumulator documents."""
        return {
            **self.adjacent.finish(),
            **self.distance.finish(),
            **self.map.finish(),
            **self.ratios.finish(),
            **({} if self.damage is None else self.damage.finish()),
        }
