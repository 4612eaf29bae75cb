"""What a calibration does, counted: multiply-adds, numbers gone over, operations started; and the bytes that are alive at once.

Every term has a name and follows from the sizes of the model and of the run. The factors before the terms are fitted on a
CPU (`benchmarks/real_shapes.py`): they say how many passes over memory a step makes, not how fast a device is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvprofile.calibration.measure.codec_damage import SHARES
from kvprofile.calibration.measure.damage import BUDGETS, MANY
from kvprofile.calibration.measure.probed import EVERY, PART_BYTES
from kvprofile.calibration.sensitivity import DRAWS
from kvprofile.evaluate.fidelity import PASSAGE_TOKENS, PASSAGES
from kvprofile.merging.nearest import WINDOW
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.tokens import ROWS_AGAIN

# Passes over a tensor, in units of one exponential and one product with a new tensor for each (see `Rates.element`).
PASS = 0.25  # a norm, a rotation, a sum: less than an exponential
TABLE = 4.0  # over the probe's log-probabilities, forward or backward
PROBE_LOGIT = 1.5  # over the probe's attention weights, forward or backward
SPLIT = 3.0  # the same weights set up for the damage curves
CHANGE = 2.0  # over a head's output for every budget
SLOT = 1.0  # over the probe's attention weights over slots
DROP = 1.7  # over those weights where tokens are only dropped
MERGE = 1.0  # over a layer's keys and values where they are merged
CODE = 2.0  # over a layer's keys and values where they are stored by a codec and read
REGRESSION = 1.0  # over the same where values are solved for
SIMILAR = 1.0  # over the cosines of lost tokens and survivors
STATISTICS = 12.0  # over a layer's keys and values: maps, histograms, sets
SET_RULES = 2  # anchor and complete sets, filled token by token

LAYER_LAUNCHES = 40  # operations of a layer's forward
MERGE_LAUNCHES = 250  # of one layer merged once
CODE_LAUNCHES = 40  # of a codec, there and back
CHANGE_LAUNCHES = 30  # of one budget's damage
READINGS = 3  # of every held-out sample: full cache, plan, uniform plan
GRADIENT_TABLES = 5  # float32 tables of the probe's log-probabilities alive at once
CHECK_TABLES = 3  # the same in the check: the full cache's, the plan's, and what they are made from
PARTS = 4  # tensors as large as the probe's attention weights alive at once while damage is measured
CONTINUATION = 256  # tokens that are read after a held-out context, besides the passages


@dataclass(frozen=True)
class Sizes:
    """A model, as far as its cost goes.

    merged: layers of full attention; body: parameters a token passes through, without embeddings; parameters: all of them;
    item: bytes of a weight.
    """

    layers: int
    merged: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    body: int
    parameters: int
    item: int

    def activations(self, tokens: int) -> int:
        """Numbers that all layers put out for so many tokens: norms, projections, the MLP."""
        return tokens * self.layers * (20 * self.hidden + 5 * self.intermediate)


@dataclass(frozen=True)
class Work:
    """Multiply-adds in the weights' dtype and in float32, numbers gone over, operations started."""

    products: float = 0.0
    exact: float = 0.0
    elements: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.exact + other.exact,
            self.elements + other.elements,
            self.launches + other.launches,
        )

    def times(self, count: float) -> "Work":
        """The same so many times over."""
        return Work(self.products * count, self.exact * count, self.elements * count, self.launches * count)


def measuring(
    sizes: Sizes, tokens: int, probe: int, candidates: Sequence[str], codecs: Sequence[str] = ()
) -> dict[str, Work]:
    """Work of one sample of so many tokens, by what it is for; `probe` tokens are read after it."""
    own = 2 * sizes.kv_heads * sizes.dim * tokens  # keys and values of a layer
    work = {
        "prefill": prefill(sizes, tokens),
        "statistics": Work(elements=STATISTICS * own, launches=SET_RULES * tokens).times(sizes.layers),
    }
    if not candidates:
        return work
    rows = probe * sizes.heads
    looked = rows * (tokens + probe) * sizes.layers
    read = Work(products=probe * (sizes.body + sizes.vocabulary * sizes.hidden))
    read += Work(elements=PASS * sizes.activations(probe), launches=LAYER_LAUNCHES * sizes.layers)
    forward = Work(exact=2 * looked * sizes.dim, elements=PROBE_LOGIT * looked + TABLE * probe * sizes.vocabulary)
    backward = Work(exact=3 * looked * sizes.dim, elements=PROBE_LOGIT * looked + TABLE * probe * sizes.vocabulary)
    work["probe"] = read + forward
    work["gradients"] = (read + backward).times(DRAWS)
    split = Work(exact=rows * tokens * sizes.dim, elements=SPLIT * rows * tokens)
    work["damage"] = split.times(sizes.merged)
    for name in candidates:
        work[f"damage of {name}"] = _damage(sizes, tokens, rows, name).times(sizes.merged)
    if codecs:
        work["damage of codecs"] = _coding(sizes, tokens, rows / EVERY, len(codecs)).times(sizes.merged)
    return work


def checking(sizes: Sizes, tokens: int) -> dict[str, Work]:
    """Work of one held-out sample, by what it is for."""
    after = PASSAGES * PASSAGE_TOKENS + CONTINUATION
    read = Work(
        products=after * (sizes.body + sizes.vocabulary * sizes.hidden) + 2 * after * tokens * sizes.hidden,
        elements=PASS * sizes.activations(after) + TABLE * after * sizes.vocabulary,
        launches=2 * LAYER_LAUNCHES * sizes.layers,
    )
    own = 2 * sizes.kv_heads * sizes.dim * tokens
    merge = Work(elements=3 * MERGE * own, launches=3 * MERGE_LAUNCHES)
    return {
        "prefill": prefill(sizes, tokens).times(READINGS),
        "answers": read.times(READINGS),
        "merging": merge.times(sizes.merged * (READINGS - 1)),
    }


def prefill(sizes: Sizes, tokens: int) -> Work:
    """Reading a context: the weights' products, causal attention, and the passes between them."""
    return Work(
        products=tokens * sizes.body + tokens**2 * sizes.heads * sizes.dim * sizes.layers,
        elements=PASS * sizes.activations(tokens),
        launches=LAYER_LAUNCHES * sizes.layers,
    )


def _damage(sizes: Sizes, tokens: int, rows: int, name: str) -> Work:
    """One layer's damage under one policy at every budget."""
    policy, own = POLICIES[name], 2 * sizes.kv_heads * sizes.dim * tokens
    curve = Work(elements=CHANGE * rows * sizes.dim, launches=CHANGE_LAUNCHES).times(len(BUDGETS))
    if policy.only_drops:
        return curve + Work(exact=rows * tokens * sizes.dim, elements=DROP * rows * tokens, launches=MERGE_LAUNCHES)
    # Beyond `MANY` few of the rows are asked.
    slots = tokens * sum(share if share <= MANY else share / EVERY for share in BUDGETS)
    work = curve + Work(exact=2 * rows * slots * sizes.dim, elements=SLOT * rows * slots)
    work += Work(elements=MERGE * own, launches=MERGE_LAUNCHES).times(len(BUDGETS))
    if policy.rule == "nearest":
        pairs = sizes.kv_heads * sum((1 - share) * tokens * min(share * tokens, WINDOW) for share in BUDGETS)
        work += Work(exact=pairs * sizes.dim, elements=SIMILAR * pairs)
    if policy.regression:
        work += Work(elements=REGRESSION * own, launches=MERGE_LAUNCHES).times(len(BUDGETS))
    if policy.matching:
        work += sum((_matching(sizes, tokens, share) for share in BUDGETS), Work())
    if policy.again:
        work += Work(exact=ROWS_AGAIN * sizes.kv_heads * tokens * sizes.dim).times(len(BUDGETS))
    return work


def _matching(sizes: Sizes, tokens: int, share: float) -> Work:
    """One layer's slots with biases and values solved for, twice by the smaller Gram matrix of attention over them."""
    slots, rows, heads = share * tokens, ROWS_AGAIN, sizes.kv_heads
    looked = Work(exact=(2 * tokens + 4 * slots) * rows * sizes.dim, elements=rows * (tokens + 3 * slots))
    solved = Work(exact=2 * min(rows, slots) * (rows * slots + min(rows, slots) ** 2 / 3))
    return (looked + solved).times(heads) + Work(launches=2 * MERGE_LAUNCHES)


def _coding(sizes: Sizes, tokens: int, rows: float, codecs: int) -> Work:
    """One layer's damage under every codec of keys and of values, on the slots of one policy."""
    own, slots = 2 * sizes.kv_heads * sizes.dim * tokens, tokens * sum(SHARES)
    looked = Work(exact=2 * rows * slots * sizes.dim, elements=SLOT * rows * slots)
    change = Work(elements=CHANGE * rows * sizes.dim, launches=CHANGE_LAUNCHES).times(2 * len(SHARES))
    stored = Work(elements=CODE * own * sum(SHARES), launches=CODE_LAUNCHES * len(SHARES))
    of_values = Work(exact=rows * slots * sizes.dim)
    merge = Work(elements=(MERGE + REGRESSION) * own, launches=MERGE_LAUNCHES).times(len(SHARES) - 1)
    return looked + merge + (looked + of_values + change + stored).times(codecs)


def prefill_bytes(sizes: Sizes, tokens: int) -> int:
    """Bytes alive beside weights and cache while a text is read: of one layer, each goes before the next comes."""
    return tokens * (3 * sizes.intermediate + 6 * sizes.hidden) * sizes.item


def memory(
    sizes: Sizes, tokens: int, probe: int, candidates: Sequence[str], *, check: bool, draws: int = DRAWS
) -> dict[str, int]:
    """Bytes alive at once by what they are for; `working` is the largest of what the stages need besides."""
    item, table = sizes.item, 4 * sizes.vocabulary
    cache = 2 * sizes.layers * sizes.kv_heads * sizes.dim * tokens * item
    stages = {"prefill": prefill_bytes(sizes, tokens)}
    if candidates:
        graph = probe * sizes.layers * (8 * sizes.hidden + 4 * sizes.intermediate) * item
        stages["gradients"] = graph + GRADIENT_TABLES * probe * table
        slopes = draws * probe * sizes.layers * sizes.heads * sizes.dim * 4
        weights = min(PART_BYTES, 4 * probe * sizes.heads * (tokens + probe))
        stages["damage"] = slopes + probe * table + PARTS * weights + 6 * 4 * sizes.kv_heads * sizes.dim * tokens
    if check:
        after = PASSAGES * PASSAGE_TOKENS + CONTINUATION
        stages["check"] = CHECK_TABLES * after * table + 2 * cache
    return {
        "weights": sizes.parameters * item,
        "cache": cache,
        "statistics": 8 * sizes.layers * sizes.kv_heads * (tokens + 1600 + 1024 + 3000),
        "working": max(stages.values()),
    }
