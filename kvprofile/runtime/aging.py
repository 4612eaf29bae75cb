"""What becomes of a forward once its tokens are known to stay: its attention is counted, and what has aged is merged.

Rows of a batch that stand alike (the same padding, the same past) go through it together, all others by themselves, on their
own tokens only: so every row of a padded batch is what it would be alone.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.merging.counts import slots_of
from kvprofile.merging.host import indexer
from kvprofile.merging.merge import merge_layer
from kvprofile.merging.scores import estimated_mass, pooled, window_mass
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Queries, Tokens, asked_again, newest_queries
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.rows import Places, Row, alike
from kvprofile.runtime.shelves import store

if TYPE_CHECKING:
    from kvprofile.runtime.state import LayerState

# What the readers of a layer asked in one forward, with the attention the tail received where it is known.
Calls = list[tuple[AttentionCall, Tensor | None]]


def settle(state: "LayerState", calls: Calls) -> None:
    """Count the attention the tail received in the newest forward, and merge what has aged."""
    windows: dict[int, Tensor] = {}
    if state.needs_mass:
        for call, tail_mass in calls:
            _count(state, call, tail_mass, windows)
    if any(_aged(state, row) for row in set(state.rows)):
        _merge(state, windows, calls)


def _count(state: "LayerState", call: AttentionCall, tail_mass: Tensor | None, windows: dict[int, Tensor]) -> None:
    """Add the attention that the tail received in one call, and that from its newest queries to `windows`."""
    if tail_mass is None or not all(row.merged for row in state.rows):
        tail_mass = _estimated(state, call, tail_mass, windows)
    if state.mass is not None:
        tail_mass.narrow(-1, 0, state.mass.shape[-1]).add_(state.mass)
    state.mass = tail_mass


def _estimated(
    state: "LayerState", call: AttentionCall, tail_mass: Tensor | None, windows: dict[int, Tensor]
) -> Tensor:
    """Attention the tail received, where some rows have no slots yet and theirs has to be computed."""
    mass = torch.zeros(len(state.rows), state.kv_heads, state.tail.tokens, device=state.device)
    for row, places in alike(state.rows):
        first = state.tail.tokens - state.own(row)
        queries = min(call.query.shape[2], state.own(row))
        here = indexer(places, mass.device)
        if row.merged and tail_mass is not None:
            mass[here, :, first:] = tail_mass[here, :, first:]
        elif queries:
            query, key = call.query[here, :, -queries:], state.tail.keys[here, :, first : state.tail.tokens]
            mass[here, :, first:] = estimated_mass(query, key, call.softmax)
            # Once slots exist the tail's own mass comes from the newest queries anyway.
            for size in state.setting.windows if _aged(state, row) else ():
                received = windows.setdefault(size, torch.zeros_like(mass))
                received[here, :, first:] += window_mass(query, key, call.softmax, window=size)
    return mass


def _recent(state: "LayerState", row: Row) -> int:
    """How many of the row's newest tokens stay in the tail."""
    seen = state.seen - row.padding
    return max(protection.recent_tokens(seen) for protection in state.setting.protections)


def _aged(state: "LayerState", row: Row) -> int:
    """How many of the row's oldest tail tokens are to be merged now: a whole chunk or more, or none."""
    aged = state.own(row) - _recent(state, row)
    return aged if aged >= state.setting.chunk else 0


def _merge(state: "LayerState", windows: dict[int, Tensor], calls: Calls) -> None:
    """Turn what has aged in every row into slots, and let it go from the tail."""
    merged: list[Slots] = []
    owners: list[int] = []
    kv_heads = state.kv_heads
    everywhere = range(len(state.rows))
    rows = list(state.rows)
    for row, places in alike(state.rows):
        aged = _aged(state, row)
        if not aged:
            continue
        indices = everywhere[places] if isinstance(places, slice) else places
        owners += [place * kv_heads + head for place in indices for head in range(kv_heads)]
        heavy = tuple(policy.protection.heavy_tokens(state.seen - row.padding) for policy, _ in state.setting.policies)
        merged.append(_into_slots(state, row, places, aged, heavy=heavy, windows=windows, calls=calls))
        for place in indices:
            rows[place] = Row(row.padding, row.merged + aged, heavy)
    store(state, merged[0] if len(merged) == 1 else _joined(merged), owners, calls[0][0])
    state.rows = rows
    first = state.tail.tokens - max(map(state.own, rows))
    if first:
        state.tail.forget_oldest(first)
        if state.mass is not None:
            state.mass = state.mass[..., first:].clone()


def _into_slots(
    state: "LayerState",
    row: Row,
    places: Places,
    aged: int,
    *,
    heavy: tuple[int, ...],
    windows: dict[int, Tensor],
    calls: Calls,
) -> Slots:
    """Merge the `aged` oldest tokens of the rows at `places`, which stand alike."""
    own, seen = state.own(row), state.seen - row.padding
    part, here = slice(state.tail.tokens - own, state.tail.tokens), indexer(places, state.device)
    mass = None if state.mass is None else state.mass[here, :, part]
    newest = {
        size: windows[size][here, :, part] if mass is None or not row.merged else pooled(mass)
        for size in state.setting.windows
    }
    tokens = Tokens(state.tail.keys[here, :, part], state.tail.values[here, :, part], mass, newest, seen - own, seen)
    if not row.merged:
        tokens = replace(
            tokens, queries=_newest_queries(state, row, places, calls), again=_again(state, row, places, calls)
        )
    return merge_layer(
        tokens.oldest(aged),
        state.setting.policies,
        epsilon=state.setting.epsilon,
        count=_room(state, row, places, heavy) if state.setting.exact else None,
        heavy=tuple(now - before for now, before in zip(heavy, row.heavy, strict=True)),
    )


def _room(state: "LayerState", row: Row, places: Places, heavy: tuple[int, ...]) -> Tensor:
    """Slots that the plan leaves for what is merged now, beside those stored and the recent tokens: `(rows, kv_heads)`."""
    setting, seen, recent, kv_heads = state.setting, state.seen - row.padding, _recent(state, row), state.kv_heads
    held = torch.tensor(state.merged_lengths()).view(-1, kv_heads)[places] + recent
    wanted = slots_of(setting.share, seen).expand_as(held).clone()
    for (policy, heads), mass in zip(setting.policies, heavy, strict=True):
        # Before any share has room for it there is the least slot; later a slot may be opened where a part of one is left.
        least = policy.least(0)
        opened = torch.minimum(held + least, (setting.share * seen).long() + least)
        opened.clamp_(min=policy.least(policy.protection.first + recent + mass))
        index = list(heads)
        wanted[:, index] = torch.maximum(wanted, opened)[:, index]
    return wanted - held


def _newest_queries(state: "LayerState", row: Row, places: Places, calls: Calls) -> Queries | None:
    """The newest queries of rows without slots, if they are needed."""
    asked = min(state.setting.queries, state.own(row), calls[0][0].query.shape[2])
    if not asked:
        return None
    keys, values = _tail(state, places)
    here = indexer(places, state.device)
    return _of_readers([newest_queries(call.query[here], keys, values, call.softmax, count=asked) for call, _ in calls])


def _again(state: "LayerState", row: Row, places: Places, calls: Calls) -> Queries | None:
    """Queries of all of the text of rows without slots, asked again after it, if they are needed and can be turned."""
    if not state.setting.again:
        return None
    keys, values = _tail(state, places)
    here, count = indexer(places, state.device), min(state.own(row), calls[0][0].query.shape[2])
    found = []
    for call, _ in calls:
        if call.rotary is None:
            return None
        query = call.query[here, :, -count:]
        found.append(asked_again(query, keys, values, call.softmax, call.rotary.turned))
    return _of_readers(found)


def _tail(state: "LayerState", places: Places) -> tuple[Tensor, Tensor]:
    here = indexer(places, state.device)
    return state.tail.keys[here], state.tail.values[here]


def _of_readers(found: list[Queries]) -> Queries:
    """The queries of all layers that read the same keys as one group."""
    sinks = [one.sinks for one in found if one.sinks is not None]
    states = torch.cat([one.states for one in found], dim=2)
    return replace(found[0], states=states, sinks=torch.cat(sinks, dim=1) if sinks else None)


def _joined(parts: list[Slots]) -> Slots:
    """Slots of some rows, then of others."""
    keys, values, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias"))
    return Slots(keys, values, bias, [length for part in parts for length in part.lengths])
