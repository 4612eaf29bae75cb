"""What a layer's calls have in common until its slots move: the records of its shelves, and who does what."""

import struct
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvprofile.codecs.rotation import rotation_matrix
from kvprofile.runtime.backends.compiled.formats import KINDS, format_of
from kvprofile.runtime.backends.compiled.records import CALL, ITEM, LAYER, SHELF
from kvprofile.runtime.backends.compiled.threads import in_parallel

if TYPE_CHECKING:
    from kvprofile.runtime.backends.contract import Asked
    from kvprofile.runtime.blocks import Blocks
    from kvprofile.runtime.shelf import Shelf

ITEMS_PER_THREAD = 6  # so that no thread waits long for another, and a row's pieces stay few
TILE = 64  # tokens of the tail at a time
_CALL = struct.Struct(f"{len(CALL)}q2f")


class Plan:
    """The records of one layer; addresses in them are those of arrays and tensors that the plan holds, or the shelves."""

    def __init__(self, shelves: "Sequence[Shelf]", asked: int, threads: int, with_tail: bool) -> None:
        self.made_for = asked, threads, with_tail
        self.threads, self.counts_of = threads, [weakref.ref(shelf.blocks.counts) for shelf in shelves]
        self.held: list[Any] = []
        facts, rows = shelves[0].facts, len(shelves[0].blocks.lengths)
        self.value_dim = facts.value_dim
        items, self.first = _items(shelves, self.threads, with_tail)
        self.items, self.owner = len(items), items["row"]
        self.counts = np.diff(self.first)
        self.missing = np.empty(rows, dtype=np.int64)
        table = np.zeros(len(shelves), dtype=SHELF)
        for record, shelf in zip(table, shelves, strict=True):
            self._describe(record, shelf)
        room = -(-max(facts.head_dim, facts.value_dim) // 16) * 16 + 16  # codes may come by eights
        tile = max(TILE, *(shelf.blocks.size for shelf in shelves))
        scratch = -(-(asked * (room + tile + 1) + tile + room + tile * room) // 16) * 16
        self.piece_floats = len(items) * asked * (facts.value_dim + 2)
        self.scratch_floats = scratch * self.threads
        self.memory: Any = np.zeros(LAYER.itemsize, dtype=np.uint8)
        self.address = self._kept(self.memory)
        layer = self.memory.view(LAYER)[0]
        known = {
            "items": len(items),
            "rows": rows,
            "asked": asked,
            "dim": facts.head_dim,
            "value_dim": facts.value_dim,
            "alone": not with_tail,
            "tail_kind": KINDS[facts.dtype],
            "item_table": self._kept(items),
            "shelf_table": self._kept(table),
            "first": self._kept(self.first),
            "missing": self._kept(self.missing),
            "scratch_size": 4 * scratch,
            "room": room,
            "tile": tile,
        }
        for name, number in known.items():
            layer[name] = number

    def holds(self, shelves: "Sequence[Shelf]", asked: int, threads: int, with_tail: bool) -> bool:
        """False if the plan was made for another call, or slots have moved since; new ones in the same room do not matter."""
        return self.made_for == (asked, threads, with_tail) and all(
            shelf.blocks.counts is known() for shelf, known in zip(shelves, self.counts_of, strict=True)
        )

    def run(self, kernel: int, asked: "Asked", numbers: dict[str, int]) -> None:
        """Let every thread call the function of that address, with these numbers of `records.CALL`; the rest are 0."""
        query, softmax = asked.query.contiguous(), asked.softmax
        numbers |= {"query": query.data_ptr(), "query_kind": KINDS[query.dtype], "queries": asked.queries}
        told = [numbers.get(name, 0) for name in CALL]
        _CALL.pack_into(self.memory, 0, *told, softmax.scaling, softmax.softcap or 0.0)
        self.missing[:] = self.counts
        in_parallel(kernel, self.address, min(self.threads, self.items))

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copy of a cache makes its own: the addresses are those of the original."""

    def _kept(self, array: np.ndarray) -> int:
        """The address of an array that lives as long as the plan."""
        self.held.append(array)
        return array.ctypes.data

    def _describe(self, record: Any, shelf: "Shelf") -> None:
        blocks, facts = shelf.blocks, shelf.facts
        record["size"] = blocks.size
        record["order"] = self._kept(_order(blocks))
        record["filled"] = blocks.filled.data_ptr()
        if blocks.bias is not None:
            record["bias"], record["bias_kind"] = blocks.bias.data_ptr(), KINDS[blocks.bias.dtype]
        if shelf.mean is not None:
            self.held.append(mean := shelf.mean.contiguous())
            record["mean"] = mean.data_ptr()
        for name, codec, parts, dim in (
            ("keys", shelf.key_codec, blocks.keys, facts.head_dim),
            ("values", shelf.value_codec, blocks.values, facts.value_dim),
        ):
            form, part = format_of(codec.name, facts.dtype), record[name]
            assert form is not None
            part["kind"], part["half"] = form.kind, form.half
            part["elements"], part["width"] = parts[0].data_ptr(), parts[0].shape[-1]
            if len(parts) > 1:
                part["facts"], part["facts_width"] = parts[1].data_ptr(), parts[1].shape[-1]
            if form.table is not None:
                part["table"], part["per"] = form.table.data_ptr(), form.table.shape[1]
            if codec.rotated:
                part["turn"] = rotation_matrix(dim, torch.device("cpu")).data_ptr()


def _order(blocks: "Blocks") -> np.ndarray:
    """The blocks head by head."""
    return np.argsort(blocks.owner.numpy(), kind="stable")


def _items(shelves: "Sequence[Shelf]", threads: int, with_tail: bool) -> tuple[np.ndarray, np.ndarray]:
    """The items of all rows, a tail's the last of its row, and where every row's begin and the last ends."""
    counts = [np.bincount(shelf.blocks.owner.numpy(), minlength=len(shelf.blocks.lengths)) for shelf in shelves]
    ends = [np.cumsum(of_shelf) for of_shelf in counts]
    step = max(1, -(-sum(int(of_shelf.sum()) for of_shelf in counts) // (threads * ITEMS_PER_THREAD)))
    items: list[tuple[int, int, int, int]] = []
    first = [0]
    for row in range(len(counts[0])):
        for place, (count, end) in enumerate(zip(counts, ends, strict=True)):
            low, high = int(end[row] - count[row]), int(end[row])
            items += [(row, place, begin, min(begin + step, high)) for begin in range(low, high, step)]
        if with_tail:
            items.append((row, -1, 0, 0))
        first.append(len(items))
    return np.array(items, dtype=ITEM), np.array(first, dtype=np.int64)
