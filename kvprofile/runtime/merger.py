"""The runtime's public face: attach a profile to a model, hand out caches, detach."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvprofile.errors import KVProfileError
from kvprofile.profile.fingerprint import check_fit, model_facts
from kvprofile.profile.profile import Profile
from kvprofile.profile.storage import load_profile, profile_of
from kvprofile.runtime.attachment import Attachment
from kvprofile.runtime.cache import MergedCache
from kvprofile.runtime.default import dismiss, serve
from kvprofile.runtime.install import check_kind, install, restore
from kvprofile.runtime.settings import Settings
from kvprofile.runtime.watch import refuse_compiled
from kvprofile.runtime.window_setting import check_windows

if TYPE_CHECKING:
    import numpy as np


class KVMerger:
    """Merges the KV cache of a model as its profile says.

    ```python
    merger = KVMerger.from_profile("profile.json").attach(model)
    out = model.generate(**inputs, past_key_values=merger.cache())   # one cache per generation
    with merger.generating():                                        # or: every generation in here gets one
        out = pipeline(prompt)
    merger.detach()
    ```

    last_cache: the cache that `generating` or `attach(default=True)` handed out last, held until the next one or `detach`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model: PreTrainedModel | None = None
        self.last_cache: MergedCache | None = None

    @classmethod
    def from_profile(
        cls,
        profile: "str | Path | Profile | dict[str, Any]",
        *,
        mode: str | None = None,
        backend: str | None = None,
        arrays: "Mapping[str, np.ndarray] | None" = None,
    ) -> "KVMerger":
        """Read a profile: a path, a loaded `Profile`, or its JSON values.

        `mode` overrides the plan's: `threshold` merges by the calibrated epsilons and slots emerge, `exact` meets every
        head's share to the slot. `backend` asks for one way to attend to what is stored, by its name in
        `runtime.backends.table.BACKENDS`; else the first that is able to serves. `arrays` are the profile's, where they do
        not lie beside it: packed keys are centred by `key_mean` in them. Raises KVProfileError or MismatchError where the
        profile cannot be used, UsageError for an unknown name.
        """
        if isinstance(profile, (str, Path)):
            profile = load_profile(profile)
        elif not isinstance(profile, Profile):
            profile = profile_of(profile)
        return cls(Settings.from_profile(profile, mode, backend, arrays))

    def attach(self, model: PreTrainedModel, *, default: bool = False) -> "KVMerger":
        """Switch the model to our attention; without a merged cache it computes what it computed before.

        With `default` every `generate` that is passed no cache gets a fresh one, until `detach`; see `generating`. Where an
        adapter of PEFT is around the model, the model inside is switched.

        Raises MismatchError for a profile of another model, KVProfileError where the model cannot be supported.
        """
        if self.model is not None:
            raise KVProfileError("this merger is attached already; detach it first, or make another from the profile")
        check_kind(model)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = (
                model.get_base_model()
            )  # the model inside an adapter of PEFT: its forward and `generate` are what runs
        check_fit(self.settings.model_name, self.settings.facts, model_facts(model.config))
        readers = install(model)
        try:
            check_windows(self.settings.windows, readers)
        except KVProfileError:
            restore(model)
            raise
        self.attachment = Attachment(readers)
        self.model = model
        if default:
            serve(model, self._hand_out)
        return self

    def cache(self) -> MergedCache:
        """An empty cache for one generation."""
        if self.model is None:
            raise KVProfileError("the merger is not attached to a model; call merger.attach(model) first")
        refuse_compiled(self.model)
        return MergedCache(self.model.config, self.settings.layers, self.attachment, self.settings.windows)

    @contextmanager
    def generating(self) -> Iterator["KVMerger"]:
        """Give every `generate` of the model that is passed no cache a fresh one, in all threads, until the block ends.

        For callers that cannot pass one: pipelines, chat loops, evaluations. `last_cache` is the one handed out last. A cache
        that is passed wins; of nested blocks the newest. Raises KVProfileError if the merger is not attached; in the block
        `generate` raises it for `use_cache=False` and for a `cache_implementation`.
        """
        self.cache()  # refuses what is not attached, or compiled
        model, maker = self.model, self._hand_out
        assert model is not None
        serve(model, maker)
        try:
            yield self
        finally:
            dismiss(model, maker)

    def _hand_out(self) -> MergedCache:
        self.last_cache = None  # gives its memory back before the next one grows
        self.last_cache = cache = self.cache()
        return cache

    def detach(self) -> None:
        """Give the model its own attention back; harmless if nothing is attached."""
        if self.model is not None:
            while dismiss(self.model, self._hand_out):
                pass
            self.last_cache = None
            restore(self.model)
            self.model = None
            self.attachment.active = False
