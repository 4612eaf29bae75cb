"""What a layer's calls have in common between two merges: the records of its shelves, and who does what."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvprofile.codecs.rotation import rotation_matrix
from kvprofile.runtime.backends.compiled.formats import KINDS, format_of
from kvprofile.runtime.backends.compiled.records import ITEM, LAYER, SHELF
from kvprofile.runtime.backends.compiled.threads import in_parallel

if TYPE_CHECKING:
    from kvprofile.runtime.backends.contract import Asked
    from kvprofile.runtime.blocks import Blocks
    from kvprofile.runtime.shelf import Shelf

ITEMS_PER_THREAD = 6  # so that no thread waits long for another, and a row's pieces stay few
TILE = 64  # tokens of the tail at a time


def mark_of(shelves: "Sequence[Shelf]", asked: int, threads: int, with_tail: bool) -> tuple[Any, ...]:
    """Equal as long as a plan holds: who asks, where all slots lie, and how many every head has."""
    places = [part.data_ptr() for shelf in shelves for part in shelf.blocks.tensors()]
    return asked, threads, with_tail, places, [list(shelf.blocks.lengths) for shelf in shelves]


class Plan:
    """The records of one layer; addresses in them are those of arrays and tensors that the plan holds, or the shelves."""

    def __init__(self, shelves: "Sequence[Shelf]", mark: tuple[Any, ...]) -> None:
        asked, self.threads, with_tail, *_ = self.mark = mark
        self.held: list[Any] = []
        facts, rows = shelves[0].facts, len(shelves[0].blocks.lengths)
        self.value_dim = facts.value_dim
        items, self.first = _items(shelves, self.threads, with_tail)
        self.items, self.owner = len(items), torch.from_numpy(items["row"])
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
        self.layer = np.zeros((), dtype=LAYER)
        known = {
            "items": len(items),
            "rows": rows,
            "asked": asked,
            "dim": facts.head_dim,
            "value_dim": facts.value_dim,
            "item_table": self._kept(items),
            "shelf_table": self._kept(table),
            "first": self._kept(self.first),
            "missing": self._kept(self.missing),
            "alone": not with_tail,
            "scratch_size": 4 * scratch,
            "room": room,
            "tile": tile,
            "query_kind": KINDS[facts.dtype],
        }
        for name, number in known.items():
            self.layer[name] = number
        for name in ("recent_keys", "recent_values"):
            self.layer[name]["kind"] = KINDS[facts.dtype]

    def set(self, asked: "Asked", **numbers: int) -> None:
        """Tell the kernel what is asked, and where it is to work."""
        query, softmax, layer = asked.query.contiguous(), asked.softmax, self.layer
        self.query = query  # as long as the kernel reads it
        layer["query"], layer["query_kind"], layer["queries"] = query.data_ptr(), KINDS[query.dtype], asked.queries
        layer["scaling"], layer["softcap"] = softmax.scaling, softmax.softcap or 0
        for name, number in numbers.items():
            layer[name] = number

    def set_tail(self, keys: Tensor, values: Tensor) -> None:
        """Tell it where the tail lies."""
        for name, part in (("recent_keys", keys), ("recent_values", values)):
            self.layer[name]["elements"], self.layer[name]["width"] = part.data_ptr(), part.stride(2)

    def run(self, kernel: int) -> None:
        """Let every thread call the function of that address."""
        self.missing[:] = self.counts
        self.layer["next"] = self.layer["workers"] = 0
        in_parallel(kernel, self.layer.ctypes.data, min(self.threads, self.items))

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
