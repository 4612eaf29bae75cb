"""The kernel: threads take one item after the other, and the last to finish an item of a row joins its pieces."""

import hashlib
from pathlib import Path
from typing import Any

from numba import cfunc, njit

from kvprofile.runtime.backends.compiled.arithmetic import NOTHING
from kvprofile.runtime.backends.compiled.low_level import counted, items_at, layers_at, long_row, shelves_at
from kvprofile.runtime.backends.compiled.reading import FAST
from kvprofile.runtime.backends.compiled.recent import join_row, of_tail
from kvprofile.runtime.backends.compiled.records import OFFSETS
from kvprofile.runtime.backends.compiled.slots import clear, of_slots, piece

_NEXT, _WORKERS = OFFSETS["next"], OFFSETS["workers"]


@njit(**FAST)
def _turn_back(layer, row, items):
    """The rotation of the values of the shelf that a row's slots are on, or 0."""
    begin = long_row(layer.first, row + 1)[row]
    shelf = items[begin].shelf
    return shelves_at(layer.shelf_table, shelf + 1)[shelf].values.turn if shelf >= 0 else 0


@njit(**FAST)
def _do(layer, items, index, scratch):
    item = items[index]
    tops, totals, sums = piece(layer, index)
    for place in range(layer.asked):
        tops[place] = NOTHING
        clear(sums[place], layer.value_dim)
    clear(totals, layer.asked)
    if item.shelf < 0:
        of_tail(layer, item.row, scratch, tops, totals, sums)
    else:
        of_slots(layer, item, scratch, tops, totals, sums)
    if not layer.alone and counted(layer.missing + 8 * item.row, -1) == 1:
        join_row(layer, item.row, _turn_back(layer, item.row, items), scratch)


def _digest() -> str:
    """Of all the code that is compiled."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def compiled(cache: bool) -> Any:
    """Compile the function that every thread runs, given the address of a `LAYER`; with `cache` it is kept on disk.

    Raises RuntimeError where nothing can be kept because no folder can be written to.
    """
    code = _digest()

    @cfunc("void(int64)", cache=cache, fastmath=FAST["fastmath"], error_model="numpy")
    def work(address):
        code  # noqa: B018 - what a function closes over names it on disk, and numba looks for changes in this file alone
        layer = layers_at(address, 1)[0]
        items = items_at(layer.item_table, layer.items)
        scratch = layer.scratch + counted(address + _WORKERS, 1) * layer.scratch_size
        index = counted(address + _NEXT, 1)
        while index < layer.items:
            _do(layer, items, index, scratch)
            index = counted(address + _NEXT, 1)

    return work
