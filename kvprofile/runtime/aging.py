"""What becomes of a forward once its tokens are known to stay: its attention is counted, and what has aged is merged.

Rows of a batch that stand alike (the same padding, the same past) go through it together, all others by themselves, on their
own tokens only: so every row of a padded batch is what it would be alone.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvprofile.merging.counts import slots_of
from kvprofile.merging.host import indexer
from kvprofile.merging.merge import merge_layer
from kvprofile.merging.scores import attention_mass, mass_stride, pooled, window_mass
from kvprofile.merging.slots import Slots
from kvprofile.merging.tokens import Queries, Tokens, newest_queries
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends import suited
from kvprofile.runtime.blocks import append, block_size, empty_blocks

if TYPE_CHECKING:
    from kvprofile.runtime.layer import MergedLayer

# Rows of a batch: all of them without a copy, or some.
Places = slice | list[int]  # as `selector` gives them
# What the readers of a layer asked in one forward, with the attention the tail received where it is known.
Calls = list[tuple[AttentionCall, Tensor | None]]


@dataclass(frozen=True)
class Row:
    """Where one row of the batch stands; rows that stand alike go through every step together.

    padding: tokens of padding before its text. merged: tokens of its text that are slots by now. heavy: heavy hitters
    protected among them, for every policy of the layer.
    """

    padding: int
    merged: int
    heavy: tuple[int, ...]


def settle(layer: "MergedLayer", calls: Calls) -> None:
    """Count the attention the tail received in the newest forward, and merge what has aged."""
    windows: dict[int, Tensor] = {}
    if layer.needs_mass:
        for call, tail_mass in calls:
            _count(layer, call, tail_mass, windows)
    if any(_aged(layer, row) for row in set(layer.rows)):
        _merge(layer, windows, calls)


def _count(layer: "MergedLayer", call: AttentionCall, tail_mass: Tensor | None, windows: dict[int, Tensor]) -> None:
    """Add the attention that the tail received in one call, and that from its newest queries to `windows`."""
    if tail_mass is None or not all(row.merged for row in layer.rows):
        tail_mass = _estimated(layer, call, tail_mass, windows)
    if layer.mass is not None:
        tail_mass[..., : layer.mass.shape[-1]] += layer.mass
    layer.mass = tail_mass


def _estimated(
    layer: "MergedLayer", call: AttentionCall, tail_mass: Tensor | None, windows: dict[int, Tensor]
) -> Tensor:
    """Attention the tail received, where some rows have no slots yet and theirs has to be computed."""
    mass = torch.zeros(*layer.keys.shape[:2], layer.tail, device=layer.keys.device)
    for row, places in layer.alike():
        first = layer.tail - layer.own(row)
        queries = min(call.query.shape[2], layer.own(row))
        here = indexer(places, mass.device)
        if row.merged and tail_mass is not None:
            mass[here, :, first:] = tail_mass[here, :, first:]
        elif queries:
            query, key = call.query[here, :, -queries:], layer.keys[here, :, first : layer.tail]
            mass[here, :, first:] = attention_mass(
                query, key, call.scaling, stride=mass_stride(queries), softcap=call.softcap, sinks=call.sinks
            )
            # Once slots exist the tail's own mass comes from the newest queries anyway.
            for size in layer.setting.windows if _aged(layer, row) else ():
                received = windows.setdefault(size, torch.zeros_like(mass))
                received[here, :, first:] += window_mass(
                    query, key, call.scaling, window=size, softcap=call.softcap, sinks=call.sinks
                )
    return mass


def _recent(layer: "MergedLayer", row: Row) -> int:
    """How many of the row's newest tokens stay in the tail."""
    seen = layer.seen - row.padding
    return max(policy.protection.recent_tokens(seen) for policy, _ in layer.setting.policies)


def _aged(layer: "MergedLayer", row: Row) -> int:
    """How many of the row's oldest tail tokens are to be merged now: a whole chunk or more, or none."""
    aged = layer.own(row) - _recent(layer, row)
    return aged if aged >= layer.setting.chunk else 0


def _merge(layer: "MergedLayer", windows: dict[int, Tensor], calls: Calls) -> None:
    """Turn what has aged in every row into slots, and let it go from the tail."""
    merged: list[Slots] = []
    owners: list[int] = []
    kv_heads = layer.keys.shape[1]
    everywhere = range(len(layer.rows))
    rows = list(layer.rows)
    for row, places in layer.alike():
        aged = _aged(layer, row)
        if not aged:
            continue
        indices = everywhere[places] if isinstance(places, slice) else places
        owners += [place * kv_heads + head for place in indices for head in range(kv_heads)]
        heavy = tuple(policy.protection.heavy_tokens(layer.seen - row.padding) for policy, _ in layer.setting.policies)
        merged.append(_into_slots(layer, row, places, aged, heavy=heavy, windows=windows, calls=calls))
        for place in indices:
            rows[place] = Row(row.padding, row.merged + aged, heavy)
    new = suited(merged[0] if len(merged) == 1 else _joined(merged), calls[0][0])
    if layer.slots is None:
        layer.slots = empty_blocks(new, len(layer.rows) * kv_heads, block_size(layer.seen))
    layer.slots = append(layer.slots, new, owners)
    layer.rows = rows
    first = layer.tail - max(map(layer.own, rows))
    if first:
        # Copies, not slices: a slice would keep the whole prompt's storage alive.
        layer.keys, layer.values = (old[:, :, first : layer.tail].clone() for old in (layer.keys, layer.values))
        layer.tail -= first
        if layer.mass is not None:
            layer.mass = layer.mass[..., first:].clone()


def _into_slots(
    layer: "MergedLayer",
    row: Row,
    places: Places,
    aged: int,
    *,
    heavy: tuple[int, ...],
    windows: dict[int, Tensor],
    calls: Calls,
) -> Slots:
    """Merge the `aged` oldest tokens of the rows at `places`, which stand alike."""
    own, seen = layer.own(row), layer.seen - row.padding
    part, here = slice(layer.tail - own, layer.tail), indexer(places, layer.keys.device)
    mass = None if layer.mass is None else layer.mass[here, :, part]
    newest = {
        size: windows[size][here, :, part] if mass is None or not row.merged else pooled(mass)
        for size in layer.setting.windows
    }
    tokens = Tokens(layer.keys[here, :, part], layer.values[here, :, part], mass, newest, seen - own, seen)
    if layer.setting.queries and not row.merged:
        tokens = replace(tokens, queries=_newest_queries(layer, row, places, calls))
    return merge_layer(
        tokens.oldest(aged),
        layer.setting.policies,
        epsilon=layer.setting.epsilon,
        count=_room(layer, row, places, heavy) if layer.setting.exact else None,
        heavy=tuple(now - before for now, before in zip(heavy, row.heavy, strict=True)),
    )


def _room(layer: "MergedLayer", row: Row, places: Places, heavy: tuple[int, ...]) -> Tensor:
    """Slots that the plan leaves for what is merged now, beside those stored and the recent tokens: `(rows, kv_heads)`."""
    setting, seen, recent, kv_heads = layer.setting, layer.seen - row.padding, _recent(layer, row), layer.keys.shape[1]
    lengths = [0] * (len(layer.rows) * kv_heads) if layer.slots is None else layer.slots.lengths
    held = torch.tensor(lengths).view(-1, kv_heads)[places] + recent
    wanted = slots_of(setting.share, seen).expand_as(held).clone()
    for (policy, heads), mass in zip(setting.policies, heavy, strict=True):
        # Before any share has room for it there is the least slot; later a slot may be opened where a part of one is left.
        least = policy.least(0)
        opened = torch.minimum(held + least, (setting.share * seen).long() + least)
        opened.clamp_(min=policy.least(policy.protection.first + recent + mass))
        index = list(heads)
        wanted[:, index] = torch.maximum(wanted, opened)[:, index]
    return wanted - held


def _newest_queries(layer: "MergedLayer", row: Row, places: Places, calls: Calls) -> Queries:
    """The newest queries of rows without slots; where layers share their keys, all readers' as one group."""
    here = indexer(places, layer.keys.device)
    asked = min(layer.setting.queries, layer.own(row), calls[0][0].query.shape[2])
    found = [
        newest_queries(
            call.query[here],
            layer.keys[here],
            layer.values[here],
            call.scaling,
            count=asked,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        for call, _ in calls
    ]
    sinks = [one.sinks for one in found if one.sinks is not None]
    states = torch.cat([one.states for one in found], dim=2)
    return replace(found[0], states=states, sinks=torch.cat(sinks, dim=1) if sinks else None)


def _joined(parts: list[Slots]) -> Slots:
    """Slots of some rows, then of others."""
    keys, values, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias"))
    return Slots(keys, values, bias, [length for part in parts for length in part.lengths])
