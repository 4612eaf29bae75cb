"""What the kernel is told, as records: numpy fills them in, compiled code reads them. Addresses are int64; 0 means none."""

import numpy as np

# How the elements of a stored vector are read: as they are, from 16 bits, from a byte each, from half a byte each, or by a
# table of what a byte, or a symbol of six bits (`codecs/packing.py`), stands for.
FLOAT32, BFLOAT16, FLOAT16, BYTES, NIBBLES, SYMBOLS, SIXES = range(7)

_I8, _F4 = np.dtype(np.int64), np.dtype(np.float32)

# One part of every vector, keys or values. width: elements, or bytes, from one vector to the next. facts: bfloat16 numbers of
# every vector, `facts_width` of them: a scale, and a centre. table: float32 levels, `per` for every symbol. half: the code that
# means zero. turn: the rotation `(dim, dim)` float32 that undoes the codec's, where it turns.
PART = np.dtype(
    [(name, _I8) for name in ("kind", "elements", "width", "facts", "facts_width", "table", "per", "turn")]
    + [("half", _F4)],
    align=True,
)

# One shelf. order: int64, its blocks head by head. filled: int32, slots of every block. bias: of `bias_kind`. mean: float32
# `(kv_heads, dim)`.
SHELF = np.dtype(
    [(name, _I8) for name in ("size", "order", "filled", "bias", "bias_kind", "mean")]
    + [("keys", PART), ("values", PART)],
    align=True,
)

# A share of the work that one thread does at a time: blocks `order[begin:end]` of a row on a shelf; the tail, if that is -1.
ITEM = np.dtype([(name, _I8) for name in ("row", "shelf", "begin", "end")], align=True)

# What is new in every call, int64 all of it. next: the item to be taken next; workers: threads that have come. query: `(rows,
# asked, dim)`; keys and values: the tail's first, with the elements from one batch row, KV head and token to the next. unused:
# int64 `(batch,)`; sinks: float32. output `(batch, queries, heads, value_dim)` and mass `(rows, tail)`: float32, to be written.
# pieces: float32, of every item the largest logit and the sum of weights of each query, then the outputs `(asked, value_dim)`.
# weights `(rows, asked, tail)`: the tail's logits. scratch: `scratch_size` bytes for each thread.
CALL = (
    *("next", "workers", "query", "query_kind", "queries", "kv_heads", "tail", "unused", "sinks", "output", "mass"),
    *("keys", "key_row", "key_head", "key_token", "values", "value_row", "value_head", "value_token"),
    *("pieces", "weights", "scratch"),
)

# The call, and what stays. first `(rows + 1,)`: every row's first item. missing `(rows,)`: its items that are not done. room:
# elements of a vector in a thread's scratch; tile: vectors. alone: leave the pieces as they are and join nothing.
LAYER = np.dtype(
    [(name, _I8) for name in CALL]
    + [("scaling", _F4), ("softcap", _F4)]
    + [
        (name, _I8)
        for name in (
            *("items", "rows", "asked", "dim", "value_dim", "alone", "tail_kind"),
            *("item_table", "shelf_table", "first", "missing", "scratch_size", "room", "tile"),
        )
    ],
    align=True,
)
OFFSETS = {name: field[1] for name, field in (LAYER.fields or {}).items()}
