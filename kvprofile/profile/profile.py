"""The profile as a whole: its blocks agree, it is written as JSON a person can read, and in a notebook it shows itself."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import PrivateAttr, model_validator

from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write
from kvprofile.profile.fingerprint import check_fit
from kvprofile.profile.schema import Calibration, Check, Created, ModelFacts, Plan, PolicyFacts, Statistics, Strict

if TYPE_CHECKING:
    import numpy as np

    from kvprofile.report.style import Plot

LINE = 160  # characters of an object that is written on one line


class Profile(Strict):
    """A calibrated profile. `load_profile` reads one, `save` writes one.

    In a notebook it shows itself. What needs the arrays (`replan`, `plot_similarity`, the whole `report`) reads them from
    beside the file it was read from or saved to.
    """

    schema_version: Literal[2]
    created: Created
    model: ModelFacts
    calibration: Calibration
    policies: dict[str, PolicyFacts]
    statistics: Statistics
    plan: Plan
    check: Check | None

    _path: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Shapes agree: every list that should have one entry per layer, head or threshold has it."""
        facts, thresholds = self.model, self.statistics.thresholds
        if len(facts.attention) != facts.layers:
            raise ValueError(f"model.attention has {len(facts.attention)} entries for {facts.layers} layers")
        if sorted(thresholds) != thresholds:
            raise ValueError("statistics.thresholds must rise")
        if [entry.layer for entry in self.statistics.layers] != list(range(facts.layers)):
            raise ValueError(f"statistics.layers must list layers 0 to {facts.layers - 1} in order")
        for entry in self.statistics.layers:
            for name in ("ratio", "ratio_std"):
                curves = getattr(entry, name)
                if [len(curve) for curve in curves] != [len(thresholds)] * facts.kv_heads:
                    raise ValueError(
                        f"statistics.layers[{entry.layer}].{name} is not {facts.kv_heads} x {len(thresholds)}"
                    )
        if self.statistics.policy not in self.policies:
            raise ValueError(f"statistics.policy names the unknown policy {self.statistics.policy!r}")
        if [entry.layer for entry in self.plan.layers] != facts.full_attention_layers():
            raise ValueError(f"plan.layers must list the full-attention layers {facts.full_attention_layers()}")
        for layer in self.plan.layers:
            if len(layer.heads) != facts.kv_heads:
                raise ValueError(f"plan.layers[{layer.layer}] has {len(layer.heads)} heads, not {facts.kv_heads}")
            unknown = {head.policy for head in layer.heads} - set(self.policies)
            if unknown:
                raise ValueError(f"plan.layers[{layer.layer}] names unknown policies {sorted(unknown)}")
        self._check_windows()
        if self.plan.mode == "threshold" and (lacking := self.plan.without_thresholds()):
            raise ValueError(f"plan.mode is threshold, and in layers {lacking} merged heads have no epsilon")
        if (damage := self.statistics.damage) is not None:
            if strangers := set(damage.policies) - set(self.policies):
                raise ValueError(f"statistics.damage names unknown policies {sorted(strangers)}")
            if sorted(set(damage.budgets)) != damage.budgets or not all(0 < share < 1 for share in damage.budgets):
                raise ValueError("statistics.damage.budgets must rise between 0 and 1")
            if len(set(damage.policies)) < len(damage.policies) or len(set(damage.kinds)) < len(damage.kinds):
                raise ValueError("statistics.damage names a policy or a kind twice")
            if not damage.policies or not damage.budgets or not damage.kinds:
                raise ValueError("statistics.damage names no policy, budget or kind; null says that none was measured")
            damage.check_codecs()
        return self

    def _check_windows(self) -> None:
        """Raise ValueError unless windows are measured and planned of layers that have one, each of them once."""
        facts, damage, planned = self.model, self.statistics.damage, [entry.layer for entry in self.plan.windows]
        measured = [] if damage is None else damage.windows
        for name, layers in (("plan.windows", planned), ("statistics.damage.windows", measured)):
            if sorted(set(layers)) != layers or set(layers) - set(facts.windowed_layers()):
                raise ValueError(f"{name} must list layers with a window in order: of {facts.windowed_layers()}")
        for entry in self.plan.windows:
            if len(entry.heads) != facts.kv_heads:
                raise ValueError(f"plan.windows[{entry.layer}] has {len(entry.heads)} heads, not {facts.kv_heads}")

    def to_json(self) -> str:
        """The file's text: one list of numbers or one head a line, keys in the order of the schema, a newline at the end."""
        return _collapse(json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the profile atomically. Raises KVProfileError if the file exists and `force` is off."""
        path = Path(path)
        if path.exists() and not force:
            raise KVProfileError(f"{path} exists; give --force to replace it, or another -o")
        atomic_write(path, self.to_json())
        return path

    def at(self, path: str | Path) -> Self:
        """The same profile, knowing that it lies at `path`, with its arrays beside it."""
        placed = self.model_copy()
        placed._path = Path(path)
        return placed

    def arrays(self) -> dict[str, "np.ndarray"]:
        """The big arrays: similarity maps, histograms, damage curves. Raises KVProfileError where they are not at hand."""
        from kvprofile.profile.storage import load_arrays

        if self._path is None:
            raise KVProfileError(
                "this profile lies in no file, so it has no arrays beside it; save it with save_profile"
            )
        return load_arrays(self, self._path)

    def replan(self, budget: float | None = None, *, bytes: float | None = None, **choices: str) -> "Profile":
        """The same profile with a plan for another budget, or other bytes; `choices` are those of `kvprofile.replan`.

        Raises as `kvprofile.replan` does, and KVProfileError where the arrays are not at hand.
        """
        from kvprofile.planning.plans import replan

        arrays = {} if self.statistics.arrays is None else self.arrays()
        return replan(self, arrays.get("damage_mean"), budget, bytes=bytes, measured=arrays, **choices)

    def plot_similarity(self, layer: int, head: int = 0) -> "Plot":
        """How alike a head's keys are, token by token. Raises UsageError for a layer or head the model does not have."""
        from kvprofile.report.html import make_subject
        from kvprofile.report.similarity import similarity_maps

        subject = make_subject(self.model.name, self, self.arrays(), layers=[layer], heads=[head])
        return similarity_maps(self.arrays()["similarity_map"], subject.chosen, self.calibration.measured.tokens, 380)

    def plot_plan(self) -> "Plot":
        """Share of slots that every layer and head keeps."""
        from kvprofile.report.plan_maps import slots_map
        from kvprofile.report.style import WIDE

        return slots_map(self, WIDE)

    def plot_ratios(self) -> "Plot":
        """Compression ratio of every layer against the threshold."""
        from kvprofile.report.curves import ratio_curves
        from kvprofile.report.style import WIDE

        return ratio_curves(self, WIDE)

    def report(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the report, one HTML page. Raises KVProfileError if the file exists and `force` is off."""
        from kvprofile.report.html import make_subject, write_report

        arrays = None if self._path is None or self.statistics.arrays is None else self.arrays()
        return write_report([make_subject(Path(path).stem, self, arrays)], Path(path), force=force)

    def __repr__(self) -> str:
        from kvprofile.report.verdict import verdict

        facts = self.model
        return (
            f"<Profile of {facts.name}, {facts.layers} layers x {facts.kv_heads} KV heads. {' '.join(verdict(self))}>"
        )

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from kvprofile.report.html import card_html

        return card_html(self)

    def __eq__(self, other: object) -> bool:
        """Profiles are equal that say the same, wherever they lie."""
        return isinstance(other, Profile) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # it holds lists

    def attention_layers(self) -> list[int]:
        """Indices of the full-attention layers: the ones that are merged."""
        return self.model.full_attention_layers()

    def check_model(self, facts: dict[str, Any]) -> None:
        """Raise MismatchError unless the profile was made for a model with these `fingerprint.model_facts`."""
        check_fit(self.model.name, self.model.model_dump(), facts)


def _collapse(text: str) -> str:
    """Put every innermost list of numbers, and every innermost object that is short, on one line.

    Line breaks never occur inside JSON strings. A large model has 130,000 numbers: a space after each would be a tenth of
    the file.
    """

    def on_one_line(found: re.Match[str]) -> str:
        line = "{" + re.sub(r",\n\s*", ", ", found.group(1)) + "}"
        return line if len(line) <= LINE else found.group(0)

    text = re.sub(r"\[\n\s*([^\[\]{}\"]+?)\n\s*\]", lambda m: "[" + re.sub(r",\s+", ",", m.group(1)) + "]", text)
    return re.sub(r"\{\n\s*([^\[\]{}]+?)\n\s*\}", on_one_line, text)
