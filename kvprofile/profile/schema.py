"""The blocks of a profile: what calibration found out and what the runtime applies. `profile.py` has the whole."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvprofile import names

if TYPE_CHECKING:
    pass

SCHEMA_VERSION: Literal[2] = 2

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Bounds that nothing measured comes near. Within them no sum or square overflows, and whole numbers are read as they stand.
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
# A cosine for most policies, a logarithm or a distance for others.
Threshold = Annotated[float, Field(ge=-1e15, le=1e15)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Kinds of attention with a window.
WINDOWED = ("sliding_attention", "chunked_attention")
# A name that a program using kvprofile has registered; the runtime refuses it where it is not.
Foreign = Annotated[str, Field(pattern="^x-[a-z0-9-]+$")]


class Strict(BaseModel):
    """Every block: nothing unknown, no conversion, only finite numbers, and no change."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Created(Strict):
    """When and how the profile was made: the only block that differs between two runs of the same command."""

    time: str = Field(description="UTC, ISO 8601")
    command: str = Field(description="of the calibration, and after && those that have planned it anew")
    seconds: Number = Field(description="wall time of the calibration")
    kvprofile: str
    python: str
    torch: str
    transformers: str


class ModelFacts(Strict):
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
    window: Annotated[int, Field(gt=1, le=2**31 - 1)] | None = Field(
        default=None,
        description="tokens that a query of a sliding or chunked layer sees at most, its own among them; null: no such layer",
    )

    def full_attention_layers(self) -> list[int]:
        """Indices of the layers a plan covers; sliding and other layers keep their stock cache."""
        return [index for index, kind in enumerate(self.attention) if kind == "full_attention"]

    def windowed_layers(self) -> list[int]:
        """Indices of the layers whose window can be packed."""
        return [] if self.window is None else [index for index, kind in enumerate(self.attention) if kind in WINDOWED]


class TextFacts(Strict):
    """Which text was read."""

    samples: Count
    tokens: Count = Field(description="tokens of each sample")
    kinds: dict[str, Count] = Field(description="samples of each kind of text")


class Calibration(Strict):
    """How the statistics were measured."""

    text: str
    seed: Seed
    dtype: str
    device: str
    digest: Sha256 = Field(description="of all token ids, calibration and held-out")
    measured: TextFacts
    held_out: TextFacts


class ProtectionFacts(Strict):
    """Tokens that always keep a slot of their own."""

    first: Count
    recent: Count
    recent_share: Share
    heavy_share: Share


class CombinationFacts(Strict):
    """How a set becomes a slot."""

    weights: names.Weights | Foreign
    sigma: Annotated[float, Field(gt=0, le=1e6)] | names.Sigma
    keep_pivot_key: bool
    scale_values: bool
    bias: names.Bias
    threshold: Annotated[float, Field(ge=-1, le=1)] | Literal["mean"] = Field(
        default=-1.0, description="least cosine at which a lost token joins its most similar survivor"
    )


class PolicyFacts(Strict):
    """Which tokens are protected, which give up their slots first, and what becomes of them."""

    affinity: names.Affinity | Foreign
    rule: names.Join | Foreign
    protection: ProtectionFacts
    combination: CombinationFacts
    regression: bool = Field(
        default=False, description="mend the slots' values so that the newest queries' outputs match"
    )
    matching: bool = Field(
        default=False,
        description="mend the slots' biases and values so that queries of all of the text get the same again",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of what a policy draws")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rule in ("anchor", "complete") and self.affinity != "cosine":
            raise ValueError(f"the rule {self.rule} goes by cosine, not by {self.affinity}")
        return self


class LayerStatistics(Strict):
    """Compression ratio of every head at every threshold, under the policy."""

    layer: int
    ratio: list[list[Share]] = Field(description="per head, per threshold: mean over samples of slots / tokens")
    ratio_std: list[list[Share]] = Field(description="the same: sample standard deviation over samples")


class Persistence(Strict):
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


class DamageFacts(Strict):
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

    windows: list[int] = Field(
        default=[], description="layers with a sliding window in which the codecs' damage was measured as well"
    )

    def check_codecs(self) -> None:
        """Raise ValueError unless all is said of the codecs, or nothing."""
        if self.windows and not self.codecs:
            raise ValueError("statistics.damage names windows, and no codecs that were measured there")
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


class Arrays(Strict):
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


class Statistics(Strict):
    """What was measured."""

    rule: names.SetRule = Field(description="the set rule whose ratios these are")
    policy: str = Field(description="the policy whose protected tokens count in the ratios")
    thresholds: list[Threshold]
    layers: list[LayerStatistics]
    persistence: list[Persistence]
    damage: DamageFacts | None
    arrays: Arrays | None


class HeadPlan(Strict):
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


class LayerPlan(Strict):
    """One layer's part of the plan."""

    layer: int
    epsilon: Threshold | None = Field(description="the one threshold at which the whole layer has its share")
    share: Share
    heads: list[HeadPlan]


class WindowHead(Strict):
    """How one KV head of a layer with a sliding window is stored: every token that the window sees keeps its slot."""

    key_codec: names.Codec | Foreign
    value_codec: names.Codec | Foreign
    damage: Number | None = Field(default=None, description="predicted KL, as of other heads")


class WindowPlan(Strict):
    """One layer with a sliding window whose tokens are packed, the newest aside."""

    layer: int
    heads: list[WindowHead]


class Plan(Strict):
    """What the runtime does."""

    budget: Annotated[float, Field(gt=0, le=1)] = Field(
        description="fraction of the slots asked for; where bytes were asked for, the fraction that came of it"
    )
    bytes: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="fraction asked for of the planned layers' bytes in a 16-bit cache; null: slots were asked for",
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
    predicted_damage: Number | None = Field(description="sum of the heads' damage, windows among them")
    predicted_codec_damage: Number | None = Field(default=None, description="the part of it that the codecs do")
    damage_bound: Number | None = Field(description="no allocation of this budget predicts less")
    layers: list[LayerPlan] = Field(description="the merged layers; every other layer keeps its stock cache")
    windows: list[WindowPlan] = Field(
        default=[], description="but for these, whose windows are packed: by damage where that was measured"
    )

    @property
    def codecs(self) -> dict[int, list[tuple[str, str]]]:
        """Codecs of every head's keys and values, by layer, windows among them."""
        layers: list[LayerPlan | WindowPlan] = [*self.layers, *self.windows]
        return {entry.layer: [(head.key_codec, head.value_codec) for head in entry.heads] for entry in layers}

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


class Fidelity(Strict):
    """Next-token distributions with the merged cache against the full cache; intervals are 95% bootstrap over samples."""

    recall_kl: Number = Field(description="nats per token; passages of the context repeated")
    recall_kl_interval: tuple[Number, Number]
    recall_top1: Share = Field(description="how often the most likely token is the same")
    continuation_kl: Number = Field(description="nats per token; the text that follows the context")
    continuation_kl_interval: tuple[Number, Number]
    continuation_top1: Share


class Achieved(Strict):
    """Slots over tokens on held-out samples."""

    mean: Number
    std: Number
    worst: Number = Field(description="the sample furthest from the budget")


class ModeCheck(Strict):
    """One way of running the plan, measured."""

    achieved: Achieved
    fidelity: Fidelity


class Check(Strict):
    """Measured on held-out samples, through the runtime."""

    threshold: ModeCheck | None = Field(description="null where a policy of the plan has no thresholds")
    exact: ModeCheck
    uniform: ModeCheck = Field(description="every head the same share and policy, met exactly")
    uniform_policy: str
    bytes_ratio: Number = Field(
        description="bytes allocated by the merged cache over the full cache's, in the plan's mode"
    )
