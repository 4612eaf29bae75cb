"""The part of a profile the runtime needs: the policy, and each layer's thresholds and shares."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprofile.errors import KVProfileError, MismatchError, UsageError
from kvprofile.fingerprint import FACTS
from kvprofile.merging.policies import Policy

SCHEMA_VERSION = 1
MODES = ("threshold", "exact")
CHUNK = 32  # tokens that age before they are merged; stored slots exceed the plan by no more, protected tokens aside
LONGEST_CHUNK = 64  # the same for heads with shares of less than a slot in 32 tokens


@dataclass(frozen=True)
class LayerSetting:
    """How one layer is merged.

    policies: every policy of the layer with the KV heads that follow it. epsilon `(kv_heads,)`: thresholds, inf where
    nothing is merged. share `(kv_heads,)`: fraction of the tokens that keep a slot. exact: meet the share to the slot
    instead of letting slots emerge from epsilon.
    """

    policies: tuple[tuple[Policy, tuple[int, ...]], ...]
    epsilon: Tensor
    share: Tensor
    exact: bool

    @cached_property
    def keeps_all(self) -> bool:
        """True if no head of the layer ever merges."""
        return bool((self.share >= 1).all()) if self.exact else bool(self.epsilon.isinf().all())

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
        return max(policy.queries for policy, _ in self.policies)


@dataclass(frozen=True)
class Settings:
    """What a merger applies: the model's facts, and a setting for every merged layer by its index."""

    model_name: str
    facts: dict[str, Any]
    layers: dict[int, LayerSetting]

    @classmethod
    def from_dict(cls, profile: dict[str, Any], mode: str | None = None) -> "Settings":
        """Read a profile's JSON values. `mode` overrides the plan's own.

        Raises MismatchError where the profile is of another version or incomplete.
        """
        version = profile.get("schema_version")
        if version != SCHEMA_VERSION:
            raise MismatchError(
                f"the profile has schema version {version}, this runtime reads version {SCHEMA_VERSION}; update kvprofile "
                "or calibrate anew"
            )
        if mode is not None and mode not in MODES:
            raise UsageError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
        try:
            plan, facts = profile["plan"], profile["model"]
            policies = {name: Policy.from_dict(values) for name, values in profile["policies"].items()}
            exact = _mode(mode or plan["mode"]) == "exact"
            layers = {entry["layer"]: _layer(entry, policies, exact, facts["kv_heads"]) for entry in plan["layers"]}
            endless = [
                index
                for index, layer in layers.items()
                if not exact and bool((layer.epsilon.isinf() & (layer.share < 1)).any())
            ]
            missing = {"name", *FACTS} - facts.keys()
            if missing:
                raise ValueError(f"model has no {', '.join(sorted(missing))}")
            strays = layers.keys() - set(range(facts["layers"]))
            if strays:
                raise ValueError(f"plan names layers {sorted(strays)} of a model with {facts['layers']}")
            others = [index for index in layers if facts["attention"][index] != "full_attention"]
            if others:
                raise ValueError(f"plan names layers {others}, which have no full attention of their own")
            settings = cls(facts["name"], facts, layers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MismatchError(
                f"the profile is damaged: {error!r}; run `kvprofile show` on it, or calibrate anew"
            ) from error
        if endless:
            raise UsageError(
                f"threshold mode needs a threshold for every head that is merged; the profile's layers {endless} have "
                "heads without one; use exact mode, or calibrate with --policy gauss"
            )
        return settings

    @classmethod
    def from_file(cls, path: str | Path, mode: str | None = None) -> "Settings":
        """Read a profile file. Raises KVProfileError where it cannot be read, MismatchError where it is no profile."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KVProfileError(f"cannot read the profile {path}: {error}") from error
        try:
            values = json.loads(text)
        except ValueError as error:
            raise MismatchError(
                f"{path} is not a complete JSON file ({error}); copy it again or calibrate anew"
            ) from error
        if not isinstance(values, dict):
            raise MismatchError(f"{path} is not a kvprofile profile")
        return cls.from_dict(values, mode)


def _mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def _layer(entry: dict[str, Any], policies: dict[str, Policy], exact: bool, kv_heads: int) -> LayerSetting:
    heads = entry["heads"]
    if len(heads) != kv_heads:
        raise ValueError(f"layer {entry['layer']} has {len(heads)} heads, expected {kv_heads}")
    epsilon = [float("inf") if head["epsilon"] is None else float(head["epsilon"]) for head in heads]
    share = [float(head["share"]) for head in heads]
    if any(math.isnan(value) for value in epsilon):
        raise ValueError(f"layer {entry['layer']} has a threshold that is no number")
    if not all(0 <= value <= 1 for value in share):
        raise ValueError(f"layer {entry['layer']} has a share outside 0 to 1")
    followers: dict[str, list[int]] = {}
    for index, head in enumerate(heads):
        followers.setdefault(head["policy"], []).append(index)
    groups = tuple((policies[name], tuple(indices)) for name, indices in followers.items())
    return LayerSetting(groups, torch.tensor(epsilon), torch.tensor(share, dtype=torch.float64), exact)
