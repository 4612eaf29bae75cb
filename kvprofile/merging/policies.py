"""A policy is a value: which tokens are protected, which give up their slots first, and what becomes of them."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from kvprofile.merging.affinity import AFFINITIES
from kvprofile.merging.combine import Combination
from kvprofile.merging.joining import JOINS
from kvprofile.merging.protect import Protection
from kvprofile.merging.regression import WINDOW
from kvprofile.merging.sets import SET_RULES
from kvprofile.merging.tokens import Tokens


@dataclass(frozen=True)
class Policy:
    """Everything that decides what a merged cache looks like, except the thresholds and the slot counts.

    affinity: which tokens give up their slots first (`affinity.AFFINITIES`).
    rule: what becomes of them (`joining.JOINS`): `chain`, `anchor` or `complete`: they join sets of neighbours (the latter two
        by cosine); `nearest`: the most similar survivor; `residual`: a few slots for all; `spread`, `spread-drawn`: their
        values go to the survivors after them; `drop`: they are evicted.
    protection, combination: see there; the combination is used by the rules that merge keys.
    regression: mend the slots' values afterwards (`regression.regress`).
    matching: mend their biases and values, in place of that (`matching.match`).
    seed: of what the affinity `random` and the rule `spread-drawn` draw.
    """

    affinity: str = "cosine"
    rule: str = "chain"
    protection: Protection = field(default_factory=Protection)
    combination: Combination = field(default_factory=Combination)
    regression: bool = False
    matching: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in JOINS:
            raise ValueError(f"unknown rule {self.rule!r}; expected one of {', '.join(JOINS)}")
        if self.affinity not in AFFINITIES:
            raise ValueError(f"unknown affinity {self.affinity!r}; expected one of {', '.join(AFFINITIES)}")
        if self.rule in ("anchor", "complete") and self.affinity != "cosine":
            raise ValueError(f"the rule {self.rule} goes by cosine, not by {self.affinity}")

    @property
    def only_drops(self) -> bool:
        """True if the slots hold tokens as they were: kept or dropped, nothing changed."""
        return self.rule == "drop" and not self.mends

    @property
    def mends(self) -> bool:
        """True if what slots hold is solved for after they were made."""
        return self.regression or self.matching

    @property
    def weighs(self) -> bool:
        """False if every slot counts as one token in the softmax: its bias is zero."""
        return self.matching or (JOINS[self.rule].combines and self.combination.bias != "none")

    @property
    def has_pivots(self) -> bool:
        """True if sets have a pivot, the member with the largest attention mass."""
        return self.rule in SET_RULES and self.combination.has_pivot

    @property
    def needs_mass(self) -> bool:
        """True if the attention mass has to be measured."""
        return (
            AFFINITIES[self.affinity].mass
            or self.has_pivots
            or self.protection.heavy_share > 0
            or JOINS[self.rule].mass
            or (JOINS[self.rule].combines and self.combination.by_attention)
        )

    @property
    def window(self) -> int | None:
        """How many of the newest queries' attention has to be measured, if any."""
        return AFFINITIES[self.affinity].window

    @property
    def queries(self) -> int:
        """How many of the newest queries have to be at hand when the prompt is compressed."""
        return max(AFFINITIES[self.affinity].queries, WINDOW if self.regression else 0)

    @property
    def again(self) -> bool:
        """True if queries of all of the text have to be asked again when the prompt is compressed."""
        return self.matching or AFFINITIES[self.affinity].again

    def least(self, protected: int) -> int:
        """The fewest slots that hold a text with so many protected tokens: neighbours need one to merge into."""
        return protected + (self.rule in SET_RULES)

    def rank(self, tokens: Tokens) -> Tensor:
        """How readily every token gives up its slot: `(batch, kv_heads, tokens)`."""
        return AFFINITIES[self.affinity](replace(tokens, seed=self.seed))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Policy":
        """Build a policy from `to_dict`'s output. Raises TypeError or ValueError on unknown fields or values."""
        values = dict(values)
        return cls(
            protection=Protection(**values.pop("protection")),
            combination=Combination(**values.pop("combination")),
            **values,
        )


_PAPER = Protection(first=0, recent=0, recent_share=0.17, heavy_share=0.12)

# The policies the command line offers by name.
POLICIES: dict[str, Policy] = {
    # Chains of similar keys, Gaussian weights, every slot counted for the tokens it holds.
    "gauss": Policy(),
    # The same with every token weighed by the attention it received.
    "attention": Policy(combination=Combination(weights="attention")),
    # Tokens little looked at join the set before them; the slot has its pivot's key and the whole set's attention.
    "absorb": Policy("idle", combination=Combination("attention", keep_pivot_key=True, bias="attention")),
    # Tokens that add little to outputs join the survivor most like them, wherever it is; the slot counts for all of them.
    "gather": Policy("value-attention", "nearest", combination=Combination("attention")),
    # The same, and the values solved for afterwards.
    "gather-mended": Policy("value-attention", "nearest", combination=Combination("attention"), regression=True),
    # The same, and biases and values solved for together: Attention Matching (arXiv 2602.16284).
    "gather-matched": Policy("value-attention", "nearest", combination=Combination("attention"), matching=True),
    # The same by other rankings: the attention of queries asked again, and that of the newest.
    "again-matched": Policy("again", "nearest", combination=Combination("attention"), matching=True),
    "window-matched": Policy("long-window", "nearest", combination=Combination("attention"), matching=True),
    "average": Policy(combination=Combination(weights="average")),
    # Sets keep their pivot's key and value, and count for all.
    "pivot": Policy("displacement", combination=Combination(weights="pivot")),
    # The pivot's key is kept, the values are averaged with Gaussian weights.
    "pivot-key": Policy("displacement", combination=Combination(keep_pivot_key=True)),
    # KVMerger (arXiv 2407.08454): anchor sets, sigma 5, 17% recent and 12% heavy tokens protected, no count bias.
    "kvmerger": Policy("cosine", "anchor", _PAPER, Combination(sigma=5.0, bias="none")),
    # The same with values scaled by the size of the set, exactly as printed.
    "kvmerger-printed": Policy("cosine", "anchor", _PAPER, Combination(sigma=5.0, bias="none", scale_values=True)),
    # Eviction: what is not kept is dropped.
    "h2o": Policy("mass", "drop"),
    "value-attention": Policy("value-attention", "drop"),
    "snapkv": Policy("window", "drop"),
    "snapkv-128": Policy("long-window", "drop"),
    "streaming": Policy("age", "drop"),
    # The methods of the field. Published keys and weights: see the functions named in the rule and the combination.
    # CaM (ICML 2024): what H2O evicts gives its value to the next 32 survivors; in expectation, and drawn as published.
    "cam": Policy("mass", "spread"),
    "cam-drawn": Policy("mass", "spread-drawn"),
    # D2O (arXiv 2406.13035): what H2O evicts joins the most similar survivor, if similar enough.
    "d2o": Policy("mass", "nearest", combination=Combination("similarity", bias="none", threshold="mean")),
    # LOOK-M (arXiv 2406.18139), its three operators; without images its text-first eviction is H2O's.
    "look-m-average": Policy("mass", "nearest", combination=Combination("average", bias="none")),
    "look-m-pivot": Policy("mass", "nearest", combination=Combination("midpoints", bias="none")),
    "look-m-weighted": Policy("mass", "nearest", combination=Combination("cosines", bias="none")),
    # KeepKV (arXiv 2504.09936): attention-weighted, every slot votes for all the tokens in it.
    "keepkv": Policy("window", "nearest", combination=Combination("attention", threshold=0.8)),
    # ZeroMerge, later ZSMerge (arXiv 2503.10714): residual slots with counts, under a decayed score.
    "zsmerge": Policy("decayed", "residual", combination=Combination("average")),
    "keydiff": Policy("keydiff", "drop"),
    "nestedkv": Policy("nested", "drop"),
    "expected-attention": Policy("expected", "drop"),
    # GRKV (arXiv 2605.31105) on SnapKV's selection.
    "grkv": Policy("window", "drop", regression=True),
    "random": Policy("random", "drop"),
    # Merge-off controls: the sets of a merging policy, of which only the pivot is kept. For D2O, LOOK-M and CaM that is h2o,
    # for KeepKV and GRKV snapkv.
    "gauss-off": Policy(combination=Combination("pivot", bias="none")),
    "absorb-off": Policy("idle", combination=Combination("pivot", bias="none")),
    "pivot-off": Policy("displacement", combination=Combination("pivot", bias="none")),
    "kvmerger-off": Policy("cosine", "anchor", _PAPER, Combination("pivot", bias="none")),
    "zsmerge-off": Policy("decayed", "drop"),
}
