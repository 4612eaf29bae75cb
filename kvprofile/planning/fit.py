"""Which budget fits a memory target: weights, what a forward needs, and the cache, by arithmetic alone.

The cache is counted as the runtime stores it (`runtime/blocks.py`): slots in blocks, a dense tail of the newest tokens,
whatever layers keep their stock cache. `benchmarks/fit.py` sets it beside `nbytes()`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprofile.runtime.block_size import block_size
from kvprofile.runtime.settings import CHUNK

RECENT = 32  # newest tokens that are never merged
TAIL = RECENT + 1 + CHUNK  # columns of the dense tail as soon as a token is decoded
BIAS, OWNER, MASS = 4, 8, 4  # bytes beside keys and values: of a slot, of a block, of a token of the tail
WINDOWED = ("sliding_attention", "chunked_attention")
MOST = 2**24  # tokens or rows that are looked for at most

Shares = NDArray[np.float64]  # of the slots, `(layers, kv_heads)` of the full-attention layers


@dataclass(frozen=True)
class Footprint:
    """What of a model takes memory.

    weights: bytes of all; item: bytes of a number in the cache and in activations; working: bytes that a forward needs for each
    token it reads at once; output: bytes for each row's next-token logits. kinds: every layer's attention; window: tokens that
    windowed layers keep; longest: tokens the model was made for, where known.
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

    def activations(self, tokens: int, batch: int) -> int:
        """Bytes alive beside weights and cache while `tokens` of every row are read at once."""
        return batch * (tokens * self.working + self.output)

    def stock_bytes(self, tokens: int, batch: int) -> int:
        """Bytes of the stock cache."""
        return batch * self._token * (self.merged * tokens + self._others(tokens))

    def merged_bytes(self, tokens: int, batch: int, shares: Shares) -> int:
        """Bytes of a merged cache that has read `tokens` and begun to decode."""
        if tokens < RECENT + CHUNK:  # nothing is merged yet
            return self.stock_bytes(tokens, batch)
        layers = [self._layer(tokens, layer) for layer in shares]
        return batch * (sum(layers) + self._token * self._others(tokens))

    def _layer(self, tokens: int, shares: NDArray[np.float64]) -> int:
        if (shares >= 1).all():
            return self._token * (tokens + 1 + CHUNK)
        size = block_size(tokens)
        stored = np.clip(np.round(shares * tokens) - RECENT, 1, tokens - RECENT)
        blocks = int(np.ceil(stored / size).sum())
        slot = 2 * self.dim * self.item + BIAS
        return blocks * (size * slot + OWNER) + TAIL * self._token + RECENT * self.kv_heads * MASS

    @property
    def _token(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.kv_heads * self.dim * self.item

    def _others(self, tokens: int) -> int:
        """Tokens that all layers with a window keep, summed; layers that share keys or keep a state have none of their own."""
        windowed = sum(kind in WINDOWED for kind in self.kinds)
        return windowed * min(tokens, self.window or tokens)


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
class Room:
    """The longest context at the batch asked for, and the largest batch at the context, with so large a budget; 0: none."""

    budget: float
    context: int
    batch: int


@dataclass(frozen=True)
class Fit:
    """What fits. `budget` is the largest share of the slots that does, None where none does, and `cache` its bytes.

    `needed`: bytes of the smallest cache looked at, where none fits.
    """

    weights: int
    activations: int
    reserve: int
    full: int
    left: int
    budget: float | None
    cache: int
    needed: int
    rooms: tuple[Room, ...]


def fit(
    footprint: Footprint,
    target: Target,
    *,
    shares_at: Callable[[float], Shares] | None = None,
    lowest: float | None = None,
    budgets: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
) -> Fit:
    """Solve for the budget that fits, and for what else would.

    `shares_at` says how a plan spends a budget, `lowest` the least it can; without a plan every head gets the same.
    """
    spent = shares_at or (lambda budget: np.full((footprint.merged, footprint.kv_heads), budget))
    lowest = lowest or min(1.0, (RECENT + 4) / target.context)
    left, full = target.left(footprint), footprint.stock_bytes(target.context, target.batch)

    def size(budget: float, context: int, batch: int) -> int:
        if budget >= 1:
            return footprint.stock_bytes(context, batch)
        return footprint.merged_bytes(context, batch, spent(budget))

    steps = 1000
    least = math.ceil(lowest * steps - 1e-9)
    found = _largest(lambda step: size(step / steps, target.context, target.batch) <= left, least, steps)
    budget = None if found is None else found / steps

    def room(budget: float) -> Room:
        fits = {
            "context": lambda tokens: size(budget, tokens, target.batch) <= target.left(footprint, context=tokens),
            "batch": lambda rows: size(budget, target.context, rows) <= target.left(footprint, batch=rows),
        }
        return Room(budget, **{name: _largest(test, 1, MOST) or 0 for name, test in fits.items()})

    return Fit(
        weights=footprint.weights,
        activations=footprint.activations(min(target.context, target.piece), target.batch),
        reserve=target.reserve,
        full=full,
        left=left,
        budget=budget,
        cache=0 if budget is None else size(budget, target.context, target.batch),
        needed=size(least / steps, target.context, target.batch),
        rooms=tuple(room(one) for one in budgets if one >= lowest),
    )


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

    sizes, text = sizes_of(meta_model(config), config, dtype.itemsize), config.get_text_config(decoder=True)
    return Footprint(
        weights=sizes.parameters * sizes.item if weights is None else weights,
        item=sizes.item,
        working=prefill_bytes(sizes, 1),
        output=4 * sizes.vocabulary,
        kinds=tuple(model_facts(config)["attention"]),
        window=getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None),
        kv_heads=sizes.kv_heads,
        dim=sizes.dim,
        longest=longest_text(config),
    )
