"""The runtime's public face: attach a profile to a model, hand out caches, detach."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvprofile.errors import KVProfileError
from kvprofile.fingerprint import check_fit, model_facts
from kvprofile.profile import Profile
from kvprofile.runtime.attachment import Attachment
from kvprofile.runtime.cache import MergedCache
from kvprofile.runtime.install import check_kind, install, restore
from kvprofile.runtime.settings import Settings
from kvprofile.runtime.watch import refuse_compiled
from kvprofile.storage import load_profile, profile_of


class KVMerger:
    """Merges the KV cache of a model as its profile says.

    ```python
    merger = KVMerger.from_profile("profile.json").attach(model)
    out = model.generate(**inputs, past_key_values=merger.cache())   # one cache per generation
    merger.detach()
    ```
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model: PreTrainedModel | None = None

    @classmethod
    def from_profile(cls, profile: "str | Path | Profile | dict[str, Any]", *, mode: str | None = None) -> "KVMerger":
        """Read a profile: a path, a loaded `Profile`, or its JSON values.

        `mode` overrides the plan's: `threshold` merges by the calibrated epsilons and slots emerge, `exact` meets every
        head's share to the slot. Raises KVProfileError or MismatchError where the profile cannot be used.
        """
        if isinstance(profile, (str, Path)):
            profile = load_profile(profile)
        elif not isinstance(profile, Profile):
            profile = profile_of(profile)
        return cls(Settings.from_profile(profile, mode))

    def attach(self, model: PreTrainedModel) -> "KVMerger":
        """Switch the model to our attention; without a merged cache it computes what it computed before.

        Raises MismatchError for a profile of another model, KVProfileError where the model cannot be supported.
        """
        if self.model is not None:
            raise KVProfileError("this merger is attached already; detach it first, or make another from the profile")
        check_kind(model)
        check_fit(self.settings.model_name, self.settings.facts, model_facts(model.config))
        self.attachment = Attachment(install(model))
        self.model = model
        return self

    def cache(self) -> MergedCache:
        """An empty cache for one generation."""
        if self.model is None:
            raise KVProfileError("the merger is not attached to a model; call merger.attach(model) first")
        refuse_compiled(self.model)
        return MergedCache(self.model.config, self.settings.layers, self.attachment)

    def detach(self) -> None:
        """Give the model its own attention back; harmless if nothing is attached."""
        if self.model is not None:
            restore(self.model)
            self.model = None
            self.attachment.active = False
