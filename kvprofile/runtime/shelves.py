"""A layer's shelves: which heads' slots lie on which."""

from typing import TYPE_CHECKING

from kvprofile.merging.host import sent
from kvprofile.merging.slots import Slots
from kvprofile.runtime.attention import AttentionCall
from kvprofile.runtime.backends.contract import Facts
from kvprofile.runtime.block_size import block_size
from kvprofile.runtime.settings import UNPACKED
from kvprofile.runtime.shelf import Shelf, empty_shelf

if TYPE_CHECKING:
    from kvprofile.runtime.state import LayerState


def store(state: "LayerState", slots: Slots, rows: list[int], call: AttentionCall) -> None:
    """Put slots behind those of their rows, on the shelf of each row's head; the first ones make the shelves.

    The next `slots.lengths[i]` slots belong to `rows[i]`, the row b * kv_heads + h of head h. `call` is one that the layer
    answered. Raises KVProfileError if the back end that the setting asks for cannot serve the layer.
    """
    groups = state.setting.shelves
    if not state.shelves:
        state.shelves = _empty(state, slots, call)
    for shelf, (_, heads) in zip(state.shelves, groups, strict=True):
        shelf.add(*((slots, rows) if len(groups) == 1 else _of_heads(slots, rows, heads, state.kv_heads)))


def _empty(state: "LayerState", slots: Slots, call: AttentionCall) -> list[Shelf]:
    setting, tail, softmax = state.setting, state.tail, call.softmax
    mean = setting.key_mean
    if mean is not None:
        mean = mean.to(state.device, non_blocking=True)
    return [
        empty_shelf(
            slots,
            Facts(
                state.device,
                tail.keys.dtype,
                tail.keys.shape[-1],
                tail.values.shape[-1],
                call.query.shape[1] // state.kv_heads,
                softmax.softcap is not None,
                codecs,
            ),
            len(state.rows) * state.kv_heads,
            block_size(state.seen),
            backend=setting.backend,
            mean=mean,
            weighs=codecs == UNPACKED or setting.weighs(heads),
        )
        for codecs, heads in setting.shelves
    ]


def _of_heads(slots: Slots, rows: list[int], heads: tuple[int, ...], kv_heads: int) -> tuple[Slots, list[int]]:
    """The slots of some heads, in the same order, and the rows they belong to. No question to the device."""
    index: list[int] = []
    chosen: list[tuple[int, int]] = []
    first = 0
    for row, length in zip(rows, slots.lengths, strict=True):
        if row % kv_heads in heads:
            index += range(first, first + length)
            chosen.append((row, length))
        first += length
    here = sent(index, slots.keys.device)
    keys, values, bias = (part.index_select(0, here) for part in (slots.keys, slots.values, slots.bias))
    return Slots(keys, values, bias, [length for _, length in chosen]), [row for row, _ in chosen]
