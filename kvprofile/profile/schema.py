"""The profile: what calibration found out and what the runtime applies, as JSON a person can read."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from kvprofile import names
from kvprofile.errors import KVProfileError
from kvprofile.files import atomic_write
from kvprofile.profile.fingerprint import check_fit

if TYPE_CHECKING:
    import numpy as np

    from kvprofile.report.style import Plot

SCHEMA_VERSION: Literal[2] = 2
LINE = 160  # characters of an object that is written on one line

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Bounds that nothing measured comes near. Within them no sum or square overflows, and whole numbers are read as they stand.
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
# A cosine for most policies, a logarithm or a distance for others.
Threshold = Annotated[float, Field(ge=-1e15, le=1e15)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# A name that a program using kvprofile has registered; the runtime refuses it where it is not.
Foreign = Annotated[str, Field(pattern="^x-[a-z0-9-]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Created(_Strict):
    """When and how the profile was made: the only block that differs between two runs of the same command."""

    time: str = Field(description="UTC, ISO 8601")
    command: str = Field(description="of the calibration, and after && those that have planned it anew")
    seconds: Number = Field(description="wall time of the calibration")
    kvprofile: str
    python: str
    torch: str
    transformers: str


class ModelFacts(_Strict):
    """The model the profile belongs to."""

    name: str
    source: str
    revision: str | None
    architecture: str
    model_type: str
    layers: int = Field(gt=0, le=2**16)
    query_heads: int = Field(gt=0, le=2**16)
    kv_heads: int = Field(gt=0, le=2**16)
    head_dim: int = Field(gt=0, le=2**16)
    attention: list[str] = Field(description="kind of attention of every layer; only full_attention is merged")
    rope: dict[str, Any] | None
    config_hash: Sha256

    def full_attention_layers(self) -> list[int]:
        """Indices of the layers a plan covers; sliding and other layers keep their stock cache."""
        return [index for index, kind in enumerate(self.attention) if kind == "full_attention"]


class TextFacts(_Strict):
    """Which text was read."""

    samples: Count
    tokens: Count = Field(description="tokens of each sample")
    kinds: dict[str, Count] = Field(description="samples of each kind of text")


class Calibration(_Strict):
    """How the statistics were measured."""

    text: str
    seed: Seed
    dtype: str
    device: str
    digest: Sha256 = Field(description="of all token ids, calibration and held-out")
    measured: TextFacts
    held_out: TextFacts


class ProtectionFacts(_Strict):
    """Tokens that always keep a slot of their own."""

    first: Count
    recent: Count
    recent_share: Share
    heavy_share: Share


class CombinationFacts(_Strict):
    """How a set becomes a slot."""

    weights: names.Weights | Foreign
    sigma: Annotated[float, Field(gt=0, le=1e6)] | names.Sigma
    keep_pivot_key: bool
    scale_values: bool
    bias: names.Bias
    threshold: Annotated[float, Field(ge=-1, le=1)] | Literal["mean"] = Field(
        default=-1.0, description="least cosine at which a lost token joins its most similar survivor"
    )


class PolicyFacts(_Strict):
    """Which tokens are protected, which give up their slots first, and what becomes of them."""

    affinity: names.Affinity | Foreign
    rule: names.Join | Foreign
    protection: ProtectionFacts
    combination: CombinationFacts
    regression: bool = Field(
        default=False, description="mend the slots' values so that the newest queries' outputs match"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of what a policy draws")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rule in ("anchor", "complete") and self.affinity != "cosine":
            raise ValueError(f"the rule {self.rule} goes by cosine, not by {self.affinity}")
        return self


class LayerStatistics(_Strict):
    """Compression ratio of every head at every threshold, under the policy."""

    layer: int
    ratio: list[list[Share]] = Field(description="per head, per threshold: mean over samples of slots / tokens")
    ratio_std: list[list[Share]] = Field(description="the same: sample standard deviation over samples")


class Persistence(_Strict):
    """Where the compression ratio varies, at one common threshold: standard deviations of the ratio."""

    threshold: Number
    ratio: Number = Field(description="mean over everything")
    between_samples: Number = Field(description="of a layer's ratio, between samples of one kind of text")
    between_kinds: Number | None = Field(description="of a layer's ratio, between kinds of text")
    between_layers: Number = Field(description="of the mean ratio, between layers")
    head_between_samples: Number = Field(description="of a head's ratio, between samples of one kind of text")
    head_between_kinds: Number | None = Field(description="of a head's ratio, between kinds of text")
    between_heads: Number = Field(description="of the mean ratio, between all heads of all layers")
    rank_correlation: Number | None = Field(description="of the layers' ratios between kinds of text, the lowest pair")


class DamageFacts(_Strict):
    """How damage was measured; the curves lie in the arrays file as `damage_mean` and `damage_std`."""

    policies: list[str]
    budgets: list[float] = Field(description="shares of slots at which damage was measured; at 1 it is 0")
    kinds: list[str] = Field(description="kinds of probe tokens")
    passages: Count = Field(description="passages of the context repeated in every probe")
    passage_tokens: Count
    continuation_tokens: Count
    facts: Count = Field(0, description="sentences planted in the context and asked for in other words")
    lookups: Count = Field(0, description="`name: number` lines planted in the context and looked up")
    codecs: list[names.Codec | Foreign] = Field(
        default=[], description="codecs whose damage was measured, of keys and of values apart"
    )
    codec_policies: list[str] = Field(default=[], description="the policies whose slots they stored")
    codec_shares: list[float] = Field(
        default=[], description="shares of slots at which they did; at 1 nothing is merged"
    )

    def check_codecs(self) -> None:
        """Raise ValueError unless all is said of the codecs, or nothing."""
        told = (self.codecs, self.codec_policies, self.codec_shares)
        if any(told) != all(told):
            raise ValueError("statistics.damage names codecs, codec_policies and codec_shares, or none of them")
        if len(set(self.codecs)) < len(self.codecs) or names.NO_CODEC in self.codecs:
            raise ValueError("statistics.damage.codecs names a codec twice, or none")
        if len(set(self.codec_policies)) < len(self.codec_policies) or set(self.codec_policies) - set(self.policies):
            raise ValueError("statistics.damage.codec_policies names a policy twice, or one that was not measured")
        if sorted(set(self.codec_shares)) != self.codec_shares or not all(
            0 < share <= 1 for share in self.codec_shares
        ):
            raise ValueError("statistics.damage.codec_shares must rise above 0 and up to 1")


class Arrays(_Strict):
    """The file with the big arrays: similarity maps, histograms, ratios of every rule."""

    file: str = Field(description="its bare name: it lies beside the profile")
    sha256: Sha256

    @field_validator("file")
    @classmethod
    def _bare(cls, name: str) -> str:
        if not name.endswith(".safetensors") or len(name.encode()) > 255 or any(sign in name for sign in "/\\:\0"):
            raise ValueError(
                "must be the bare name of a .safetensors file beside the profile, of at most 255 bytes, without folders"
            )
        return name


class Statistics(_Strict):
    """What was measured."""

    rule: names.SetRule = Field(description="the set rule whose ratios these are")
    policy: str = Field(description="the policy whose protected tokens count in the ratios")
    thresholds: list[Threshold]
    layers: list[LayerStatistics]
    persistence: list[Persistence]
    damage: DamageFacts | None
    arrays: Arrays | None


class HeadPlan(_Strict):
    """One KV head's part of the plan."""

    policy: str = Field(description="a name from `policies`")
    epsilon: Threshold | None = Field(description="merge neighbours at least this similar; null: merge nothing")
    share: Share = Field(description="fraction of the tokens that keep a slot")
    damage: Number | None = Field(description="predicted KL, nats per probe token, summed over the objective's kinds")
    key_codec: names.Codec | Foreign = Field(
        default=names.NO_CODEC, description="how the slots' keys are stored; none: in the model's own dtype"
    )
    value_codec: names.Codec | Foreign = Field(default=names.NO_CODEC, description="how the slots' values are stored")
    codec_damage: Number | None = Field(default=None, description="the part of the damage that the codecs do")


class LayerPlan(_Strict):
    """One layer's part of the plan."""

    layer: int
    epsilon: Threshold | None = Field(description="the one threshold at which the whole layer has its share")
    share: Share
    heads: list[HeadPlan]


class Plan(_Strict):
    """What the runtime does."""

    budget: Annotated[float, Field(gt=0, le=1)] = Field(
        description="fraction of the slots asked for; where bytes were asked for, the fraction that came of it"
    )
    bytes: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="fraction asked for of the merged layers' bytes in a 16-bit cache; null: slots were asked for",
    )
    policy: str = Field(description="the policy asked for, or auto: every head its own")
    codec: str = Field(
        default=names.NO_CODEC,
        description="the codec asked for, KEYS/VALUES where they differ, or auto: every head its own",
    )
    rule: names.BudgetRule = Field(description="how the budget is spent on layers and heads")
    objective: names.Objective
    granularity: names.Granularity
    mode: names.Mode = Field(description="slots emerge from epsilon, or meet the share to the slot")
    predicted_ratio: Share = Field(description="fraction of the slots")
    predicted_bytes: Number | None = Field(
        default=None,
        description="fraction of those bytes at the calibration's length, all overhead in; null: not known",
    )
    predicted_damage: Number | None = Field(description="sum of the heads' damage")
    predicted_codec_damage: Number | None = Field(default=None, description="the part of it that the codecs do")
    damage_bound: Number | None = Field(description="no allocation of this budget predicts less")
    layers: list[LayerPlan] = Field(description="the merged layers; every other layer keeps its stock cache")

    @property
    def asked(self) -> float:
        """What was asked for: a fraction of the slots, or of the bytes."""
        return self.budget if self.bytes is None else self.bytes

    @property
    def unit(self) -> str:
        """What it is a fraction of: slots or bytes."""
        return "slots" if self.bytes is None else "bytes"

    def without_thresholds(self) -> list[int]:
        """Layers with a head that is to be merged and has no threshold to merge by."""
        return [
            entry.layer for entry in self.layers if any(head.epsilon is None and head.share < 1 for head in entry.heads)
        ]


class Fidelity(_Strict):
    """Next-token distributions with the merged cache against the full cache; intervals are 95% bootstrap over samples."""

    recall_kl: Number = Field(description="nats per token; passages of the context repeated")
    recall_kl_interval: tuple[Number, Number]
    recall_top1: Share = Field(description="how often the most likely token is the same")
    continuation_kl: Number = Field(description="nats per token; the text that follows the context")
    continuation_kl_interval: tuple[Number, Number]
    continuation_top1: Share


class Achieved(_Strict):
    """Slots over tokens on held-out samples."""

    mean: Number
    std: Number
    worst: Number = Field(description="the sample furthest from the budget")


class ModeCheck(_Strict):
    """One way of running the plan, measured."""

    achieved: Achieved
    fidelity: Fidelity


class Check(_Strict):
    """Measured on held-out samples, through the runtime."""

    threshold: ModeCheck | None = Field(description="null where a policy of the plan has no thresholds")
    exact: ModeCheck
    uniform: ModeCheck = Field(description="every head the same share and policy, met exactly")
    uniform_policy: str
    bytes_ratio: Number = Field(
        description="bytes allocated by the merged cache over the full cache's, in the plan's mode"
    )


class Profile(_Strict):
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
