"""What a run measures, in words and numbers: enough to know its partials again and to make a profile of them."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, model_validator

from kvprofile.calibration.measure.codec_damage import CodecDamage
from kvprofile.calibration.measure.damage import DamageCurves
from kvprofile.calibration.measure.key_mean import KeyMean
from kvprofile.calibration.measure.statistics import Measurements
from kvprofile.calibration.measure.window_damage import WindowDamage
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.calibration.run_facts import run_facts
from kvprofile.errors import KVProfileError, MismatchError
from kvprofile.merging.policies import POLICIES, Policy
from kvprofile.merging.sets import SET_RULES
from kvprofile.models.offloading import input_device
from kvprofile.profile.fingerprint import model_facts
from kvprofile.profile.schema import Calibration, ModelFacts, PolicyFacts, TextFacts

if TYPE_CHECKING:
    from kvprofile.models.load import LoadedModel
    from kvprofile.samples import Sample, SampleSet


class Run(BaseModel):
    """One calibration's measuring.

    Attributes:
        model: whose statistics they are.
        calibration: on which text and device.
        policy: what was asked for: auto, or the one policy.
        base: whose protected tokens the compression ratios count.
        candidates: the policies whose damage is measured.
        codecs: the codecs whose damage is measured, on the slots of one of the candidates.
        policies: `base` and the candidates, by name.
        mix: what the probes read.
        depends: all that the numbers depend on (`run_facts`): runs that agree in it measure the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelFacts
    calibration: Calibration
    policy: str
    base: str
    candidates: tuple[str, ...]
    codecs: tuple[str, ...]
    policies: dict[str, PolicyFacts]
    mix: ProbeMix
    depends: dict[str, str]

    @model_validator(mode="after")
    def _hold_together(self) -> "Run":
        """A run that was read from a file may say anything."""
        if len(self.model.attention) != self.model.layers:
            raise ValueError(f"attention of {len(self.model.attention)} layers for {self.model.layers}")
        if unknown := {self.base, *self.candidates} - self.policies.keys():
            raise ValueError(f"no policy {', '.join(sorted(unknown))}")
        if self.calibration.measured.samples < 1 or self.calibration.measured.tokens < 2:
            raise ValueError("nothing was measured")
        if self.codecs and not self.candidates:
            raise ValueError("codecs without a policy whose slots they store")
        return self

    @property
    def samples(self) -> int:
        """How many samples are measured in all."""
        return self.calibration.measured.samples

    def statistics(self) -> Measurements:
        """Measurements that have seen nothing yet.

        Raises KVProfileError where a policy is not known here (one of a file of the user's that was not imported), or the
        statistics do not fit into memory.
        """
        try:
            known = {name: Policy.from_dict(facts.model_dump()) for name, facts in self.policies.items()}
        except (TypeError, ValueError) as error:
            raise KVProfileError(
                f"the partials use a policy that is not known here ({error}); import its file first, from Python"
            ) from error
        candidates = [(name, known[name]) for name in self.candidates]
        tokens = self.calibration.measured.tokens
        try:
            return empty_statistics(self.model, tokens, known[self.base], candidates, self.mix, codecs=self.codecs)
        except (MemoryError, ValueError) as error:
            raise KVProfileError(
                f"no memory for the statistics of {self.model.layers} layers x {self.model.kv_heads} KV heads at {tokens:,} "
                "tokens; take a machine with more, or fewer --tokens"
            ) from error

    def difference(self, other: "Run") -> tuple[str, str, str] | None:
        """What keeps two runs' samples from being joined: its name, ours and theirs; None where nothing does."""
        for name, ours in self.depends.items():
            if (theirs := other.depends.get(name)) != ours:
                return name, ours, str(theirs)
        for name in type(self).model_fields:
            if name != "depends" and getattr(self, name) != getattr(other, name):
                return name, str(getattr(self, name)), str(getattr(other, name))
        return None


def check_same(run: Run, loaded: "LoadedModel", samples: "SampleSet") -> None:
    """Raise MismatchError unless this model and text are those that the run has measured."""
    here = run_facts(loaded, samples)
    for name in ("configuration", "dtype", "weights", "text"):
        if here[name] != run.depends[name]:
            raise MismatchError(
                f"the partials were measured with another model or text: their {name} is {run.depends[name]}, this one's is "
                f"{here[name]}; give the model, --dtype, --data and --column of the measuring"
            )


def run_of(
    loaded: "LoadedModel",
    samples: "SampleSet",
    *,
    policy: str,
    base: str,
    candidates: tuple[str, ...],
    codecs: tuple[str, ...],
    mix: ProbeMix,
    seed: int,
) -> Run:
    """The run that measures these samples on this model."""
    return Run(
        model=facts_of(loaded),
        calibration=Calibration(
            text=samples.description,
            seed=seed,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            device=input_device(loaded.model).type,
            digest=samples.digest,
            measured=_text_facts(samples.calibration),
            held_out=_text_facts(samples.held_out),
        ),
        policy=policy,
        base=base,
        candidates=candidates,
        codecs=codecs,
        policies={
            name: PolicyFacts.model_validate(POLICIES[name].to_dict()) for name in dict.fromkeys((*candidates, base))
        },
        mix=mix,
        depends=run_facts(loaded, samples, policy=base, candidates=candidates, codecs=codecs, mix=mix, seed=seed),
    )


def facts_of(loaded: "LoadedModel") -> ModelFacts:
    """The facts of a model that its profile records."""
    return ModelFacts(
        name=loaded.name, source=loaded.source, revision=loaded.revision, **model_facts(loaded.model.config)
    )


def empty_statistics(
    model: ModelFacts,
    tokens: int,
    policy: Policy,
    candidates: Sequence[tuple[str, Policy]],
    mix: ProbeMix,
    *,
    rules: tuple[str, ...] = SET_RULES,
    codecs: Sequence[str] = (),
) -> Measurements:
    """Measurements of a model at samples of at most so many tokens.

    Damage curves for the candidates, if there are any, and what storing slots costs for the `codecs`.
    """
    merged, heads, windows = len(model.full_attention_layers()), model.kv_heads, model.windowed_layers()
    return Measurements(
        model.layers,
        heads,
        tokens,
        policy,
        rules=rules,
        damage=DamageCurves(merged, heads, candidates, mix.kinds) if candidates else None,
        codecs=CodecDamage(merged, heads, coded(candidates), mix.kinds, codecs) if codecs else None,
        key_mean=KeyMean(model.layers, heads, model.head_dim) if codecs else None,
        windows=WindowDamage(len(windows), heads, mix.kinds, codecs) if codecs and windows else None,
    )


def coded(candidates: Sequence[tuple[str, Policy]]) -> list[tuple[str, Policy]]:
    """The candidates on whose slots codecs are measured: one, since what a codec does hardly depends on the policy.

    The first that mends values, otherwise the first that merges, otherwise the first: its slots are the least like tokens.
    """
    return sorted(candidates, key=lambda one: (not one[1].mends, one[1].only_drops))[:1]


def _text_facts(samples: "Sequence[Sample]") -> TextFacts:
    return TextFacts(
        samples=len(samples),
        tokens=max((len(sample.context) for sample in samples), default=0),
        kinds=dict(sorted(Counter(sample.kind for sample in samples).items())),
    )
