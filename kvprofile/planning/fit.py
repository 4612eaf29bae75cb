"""What fits a memory target: weights, what a forward needs, and the cache, by arithmetic alone.

The cache is counted as the runtime stores it (`sizes.py`), once a token has been decoded. `benchmarks/fit.py` sets it beside
`nbytes()`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvprofile.planning.sizes import NOTHING, Pair, Sizes, sizes_of
from kvprofile.profile.schema import WINDOWED
from kvprofile.runtime.block_size import RECENT
from kvprofile.runtime.settings import CHUNK
from kvprofile.runtime.window import SLACK

SPARE = (1 + CHUNK, 1 + SLACK)  # columns of the tails as soon as a token is decoded
MOST = 2**24  # tokens or rows that are looked for at most
STEPS = 1000  # of an amount
BUDGETS = (1.0, 0.75, 0.5, 0.25)
BYTES = (0.5, 0.35, 0.25, 0.15)

Layer = Sequence[tuple[float, Pair]]
"""Share of the slots, and codecs, of every KV head of a full-attention layer."""


@dataclass(frozen=True)
class Kept:
    """What a plan keeps.

    layers: of every full-attention layer its heads, and how many of its newest tokens stay as they are. windows: of every
    sliding layer its heads' codecs; none: all stay as they are.
    """

    layers: Sequence[tuple[Layer, int]]
    windows: Sequence[Sequence[Pair]] = ()


@dataclass(frozen=True)
class Footprint:
    """What of a model takes memory.

    weights: bytes of all; item: bytes of a number in the cache and in activations; working: bytes that a forward needs for each
    token it reads at once; output: bytes for each row's next-token logits. kinds: every layer's attention; window: tokens that
    windowed layers see; longest: tokens the model was made for, where known.
    """

    weights: int
    item: int
    working: int
    output: int
    kinds: tuple[str, ...]
    window: int | None
    kv_heads: int
    dim: int
    longest: int | None

    @property
    def merged(self) -> int:
        """How many layers are merged."""
        return self.kinds.count("full_attention")

    @property
    def windowed(self) -> int:
        """How many layers have a window of their own; those that share keys or keep a state have none."""
        return sum(kind in WINDOWED for kind in self.kinds)

    def activations(self, tokens: int, batch: int) -> int:
        """Bytes alive beside weights and cache while `tokens` of every row are read at once."""
        return batch * (tokens * self.working + self.output)

    def stock_bytes(self, tokens: int, batch: int) -> int:
        """Bytes of the stock cache."""
        held = self.merged * tokens + self.windowed * min(tokens, self.window or tokens)
        return batch * self.kv_heads * self.sizes(tokens).stock * held

    def kept_bytes(self, tokens: int, batch: int, kept: Kept) -> int:
        """Bytes of a merged cache that has read `tokens` and begun to decode."""
        if tokens < RECENT + CHUNK:  # nothing is merged yet
            return self.stock_bytes(tokens, batch)
        sizes, plain = self.sizes(tokens), [[NOTHING] * self.kv_heads] * self.windowed
        merged = sum(sizes.layer_bytes(heads, min(recent, tokens - 1)) for heads, recent in kept.layers)
        window = self.window or tokens + 1
        return math.ceil(batch * (merged + sum(sizes.window_bytes(window, pairs) for pairs in kept.windows or plain)))

    def even(self, share: float) -> Kept:
        """The same share for every head, and no codecs."""
        return Kept([([(share, NOTHING)] * self.kv_heads, RECENT)] * self.merged)

    def sizes(self, tokens: int) -> Sizes:
        """What a head holds after so many tokens, once one more is decoded."""
        return sizes_of(tokens, self.dim, item=self.item, spare=SPARE)


@dataclass(frozen=True)
class Target:
    """What is wanted: so much memory, for `batch` texts of `context` tokens, read in pieces of `piece`."""

    memory: int
    context: int
    batch: int
    reserve: int
    piece: int

    def left(self, footprint: Footprint, *, context: int | None = None, batch: int | None = None) -> int:
        """Bytes that weights, activations and reserve leave for the cache."""
        at_once = min(self.context if context is None else context, self.piece)
        working = footprint.activations(at_once, self.batch if batch is None else batch)
        return self.memory - self.reserve - footprint.weights - working


@dataclass(frozen=True)
class Spending:
    """How amounts are spent. kept: what a plan of an amount keeps; lowest: the least there is; unit: slots or bytes.

    cost: predicted KL of an amount, in nats per token; None where nothing predicts it. amounts: those that are told.
    """

    kept: Callable[[float], Kept]
    lowest: float
    unit: str = "slots"
    cost: Callable[[float], float | None] = lambda _amount: None
    amounts: tuple[float, ...] = BUDGETS


@dataclass(frozen=True)
class Room:
    """The longest context at the batch asked for, and the largest batch at the context, with such a plan; 0: none.

    amount: of the unit. predicted_kl: nats per token, where it is known.
    """

    unit: str
    amount: float
    context: int
    batch: int
    predicted_kl: float | None


@dataclass(frozen=True)
class Found:
    """The largest amount of a unit that fits, None where none does; `cache`: its bytes, or those of the smallest there is."""

    unit: str
    amount: float | None
    cache: int
    predicted_kl: float | None


@dataclass(frozen=True)
class Fit:
    """What takes memory, what is left for the cache, how large it is in full, what fits, and what else would."""

    weights: int
    activations: int
    reserve: int
    full: int
    left: int
    found: tuple[Found, ...]
    rooms: tuple[Room, ...]


def even_spending(footprint: Footprint, context: int) -> Spending:
    """Without a plan every head gets the same."""
    return Spending(footprint.even, min(1.0, (RECENT + 4) / context))


def fit(footprint: Footprint, target: Target, spendings: Sequence[Spending]) -> Fit:
    """Solve for the largest amount that fits, of every unit, and for what else would."""
    return Fit(
        weights=footprint.weights,
        activations=footprint.activations(min(target.context, target.piece), target.batch),
        reserve=target.reserve,
        full=footprint.stock_bytes(target.context, target.batch),
        left=target.left(footprint),
        found=tuple(largest_amount(footprint, target, spending) for spending in spendings),
        rooms=tuple(
            _room(footprint, target, spending, amount)
            for spending in spendings
            for amount in spending.amounts
            if amount >= spending.lowest
        ),
    )


def largest_amount(footprint: Footprint, target: Target, spending: Spending) -> Found:
    """The largest amount that fits, in thousandths."""
    context, batch, left = target.context, target.batch, target.left(footprint)

    def size(step: int) -> int:
        if step >= STEPS:
            return footprint.stock_bytes(context, batch)
        return footprint.kept_bytes(context, batch, spending.kept(step / STEPS))

    least = math.ceil(spending.lowest * STEPS - 1e-9)
    found = _largest(lambda step: size(step) <= left, least, STEPS)
    if found is None:
        return Found(spending.unit, None, size(least), None)
    return Found(spending.unit, found / STEPS, size(found), spending.cost(found / STEPS))


def _room(footprint: Footprint, target: Target, spending: Spending, amount: float) -> Room:
    kept = None if amount >= 1 else spending.kept(amount)

    def size(context: int, batch: int) -> int:
        if kept is None:
            return footprint.stock_bytes(context, batch)
        return footprint.kept_bytes(context, batch, kept)

    def long(tokens: int) -> bool:
        return size(tokens, target.batch) <= target.left(footprint, context=tokens)

    def many(rows: int) -> bool:
        return size(target.context, rows) <= target.left(footprint, batch=rows)

    context, batch = (_largest(fits, 1, MOST) or 0 for fits in (long, many))
    return Room(spending.unit, amount, context, batch, spending.cost(amount))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number from `low` to `high` that fits, where all below one that fits do; None if none does."""
    if low > high or not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest(works: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` that works, where all above one that works do; `high` if none does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle + 1, high)
    return low


def footprint_of(config: Any, dtype: Any, *, weights: int | None = None) -> Footprint:
    """Read a model's footprint off its transformers configuration, for numbers of a torch dtype; no weights are read.

    `weights`: their bytes, where they are not kept in that dtype.
    """
    from kvprofile.calibration.cost import prefill_bytes
    from kvprofile.calibration.estimate import meta_model, sizes_of
    from kvprofile.models.context_length import longest_text
    from kvprofile.profile.fingerprint import model_facts

    sizes, facts = sizes_of(meta_model(config), config, dtype.itemsize), model_facts(config)
    return Footprint(
        weights=sizes.parameters * sizes.item if weights is None else weights,
        item=sizes.item,
        working=prefill_bytes(sizes, 1),
        output=4 * sizes.vocabulary,
        kinds=tuple(facts["attention"]),
        window=facts["window"],
        kv_heads=sizes.kv_heads,
        dim=sizes.dim,
        longest=longest_text(config),
    )
