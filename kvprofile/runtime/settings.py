"""The part of a profile the runtime needs: the policy, and each layer's thresholds and shares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvprofile.errors import MismatchError, UsageError
from kvprofile.merging.policies import Policy
from kvprofile.merging.protect import Protection
from kvprofile.names import MODES, NO_CODEC
from kvprofile.profile.profile import Profile
from kvprofile.profile.schema import LayerPlan, PolicyFacts
from kvprofile.runtime.backends.table import check_backend
from kvprofile.runtime.key_means import key_means
from kvprofile.runtime.window_setting import WindowSetting, window_settings

if TYPE_CHECKING:
    import numpy as np

CHUNK = 32  # tokens that age before they are merged; stored slots exceed the plan by no more, protected tokens aside
UNPACKED = (NO_CODEC, NO_CODEC)
LONGEST_CHUNK = 64  # the same for heads with shares of less than a slot in 32 tokens


@dataclass(frozen=True)
class LayerSetting:
    """How one layer is merged.

    policies: every policy of the layer with the KV heads that follow it; heads that follow none keep all their tokens, packed.
    epsilon `(kv_heads,)`: thresholds, inf where nothing is merged. share `(kv_heads,)`: fraction of the tokens that keep a
    slot. exact: meet the share to the slot instead of letting slots emerge from epsilon.

    codecs: how each head's keys and values are stored, by name; empty: all as they are. key_mean `(kv_heads, head_dim)`
    float32: what keys are centred by where a codec centres them. backend: who is to serve the layer, by name; None: whoever
    is first able to.
    """

    policies: tuple[tuple[Policy, tuple[int, ...]], ...]
    epsilon: Tensor
    share: Tensor
    exact: bool
    codecs: tuple[tuple[str, str], ...] = ()
    key_mean: Tensor | None = None
    backend: str | None = None

    @cached_property
    def shelves(self) -> tuple[tuple[tuple[str, str], tuple[int, ...]], ...]:
        """Every pair of codecs with the KV heads that are stored by it."""
        pairs = self.codecs or (UNPACKED,) * len(self.share)
        heads: dict[tuple[str, str], list[int]] = {}
        for head, pair in enumerate(pairs):
            heads.setdefault(pair, []).append(head)
        return tuple((pair, tuple(found)) for pair, found in heads.items())

    def weighs(self, heads: tuple[int, ...]) -> bool:
        """True if slots of these heads may have a bias."""
        return any(policy.weighs and set(heads) & set(own) for policy, own in self.policies)

    @cached_property
    def keeps_all(self) -> bool:
        """True if no head of the layer ever merges or packs: it is as the stock cache's."""
        whole = (self.share >= 1) if self.exact else self.epsilon.isinf()
        return bool(whole.all()) and all(pair == UNPACKED for pair, _ in self.shelves)

    @cached_property
    def protections(self) -> list[Protection]:
        """Who is protected: what the policies say, and for heads without one the usual."""
        following = {head for _, heads in self.policies for head in heads}
        own = [policy.protection for policy, _ in self.policies]
        return list(dict.fromkeys(own if len(following) == len(self.share) else [*own, Protection()]))

    @cached_property
    def chunk(self) -> int:
        """How many tokens age before they are merged.

        At least one slot is made of a head's chunk, so a smaller share needs a longer chunk to be met while the text grows.
        """
        least = float(self.share.min())
        return CHUNK if not self.exact else min(LONGEST_CHUNK, max(CHUNK, math.ceil(1 / max(least, 1 / LONGEST_CHUNK))))

    @cached_property
    def needs_mass(self) -> bool:
        """True if a policy of the layer needs the attention mass."""
        return any(policy.needs_mass for policy, _ in self.policies)

    @cached_property
    def windows(self) -> set[int]:
        """How many of the newest queries the layer's policies look at."""
        return {policy.window for policy, _ in self.policies if policy.window is not None}

    @cached_property
    def queries(self) -> int:
        """How many of the newest queries themselves the layer's policies need."""
        return max((policy.queries for policy, _ in self.policies), default=0)

    @cached_property
    def again(self) -> bool:
        """Whether the layer's policies need queries of all of the text, asked again after it."""
        return any(policy.again for policy, _ in self.policies)


@dataclass(frozen=True)
class Settings:
    """What a merger applies: the model's facts, and a setting for every merged layer by its index, and every packed window."""

    model_name: str
    facts: dict[str, Any]
    layers: dict[int, LayerSetting]
    windows: dict[int, WindowSetting] = field(default_factory=dict)

    @classmethod
    def from_profile(
        cls,
        profile: Profile,
        mode: str | None = None,
        backend: str | None = None,
        arrays: "Mapping[str, np.ndarray] | None" = None,
    ) -> "Settings":
        """Take what the runtime needs of a profile. `mode` overrides the plan's own, `backend` asks for one by name.

        `arrays` are the profile's; None: those that lie beside it, read where a codec needs them. Raises UsageError for a mode
        that the plan cannot be run in and for an unknown back end, MismatchError for a policy or codec that this program does
        not have, KVProfileError where the means by which keys are centred are not at hand.
        """
        check_backend(backend)
        if mode not in (None, *MODES):
            raise UsageError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
        exact = (mode or profile.plan.mode) == "exact"
        if not exact and (lacking := profile.plan.without_thresholds()):
            raise UsageError(
                f"threshold mode needs a threshold for every head that is merged; the profile's layers {lacking} have "
                "heads without one; use exact mode, or calibrate with --policy gauss"
            )
        used = {head.policy for layer in profile.plan.layers for head in layer.heads}
        policies = {name: _policy(name, facts) for name, facts in profile.policies.items() if name in used}
        means = key_means(profile, arrays)
        layers = {
            plan.layer: replace(_layer(plan, policies, exact), backend=backend, key_mean=means.get(plan.layer))
            for plan in profile.plan.layers
        }
        windows = window_settings(profile, means)
        return cls(profile.model.name, profile.model.model_dump(mode="json"), layers, windows)


def _policy(name: str, facts: PolicyFacts) -> Policy:
    try:
        return Policy.from_dict(facts.model_dump(mode="json"))
    except ValueError as error:
        raise MismatchError(
            f"the profile's policy {name} cannot be run here: {error}; import the program that registers it first"
        ) from error


def _layer(plan: LayerPlan, policies: dict[str, Policy], exact: bool) -> LayerSetting:
    followers: dict[str, list[int]] = {}
    codecs = tuple((head.key_codec, head.value_codec) for head in plan.heads)
    for index, head in enumerate(plan.heads):
        whole = head.share >= 1 if exact else head.epsilon is None
        if not whole or codecs[index] == UNPACKED:
            followers.setdefault(head.policy, []).append(index)
    groups = tuple((policies[name], tuple(indices)) for name, indices in followers.items())
    epsilon = torch.tensor([math.inf if head.epsilon is None else head.epsilon for head in plan.heads])
    share = torch.tensor([head.share for head in plan.heads], dtype=torch.float64)
    return LayerSetting(groups, epsilon, share, exact, codecs)
