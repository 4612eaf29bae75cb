"""The other items: a row's queries over the tail; and what is done with all items of a row when they are there."""

from numba import float32, njit

from kvprofile.runtime.backends.compiled.arithmetic import NOTHING, capped, exponential, fold, products
from kvprofile.runtime.backends.compiled.low_level import float_row, float_rows, long_row
from kvprofile.runtime.backends.compiled.reading import FAST, unpacked
from kvprofile.runtime.backends.compiled.slots import clear, piece, queries_of


@njit(**FAST)
def _unused(layer, batch_row):
    """Columns of the tail before the row's own tokens."""
    return long_row(layer.unused, batch_row + 1)[batch_row] if layer.unused else 0


@njit(**FAST)
def of_tail(layer, row, scratch, tops, totals, sums):  # noqa: PLR0917
    """Attention over the row's tail; its weights stay, for what every token received."""
    batch_row, head = row // layer.kv_heads, row % layer.kv_heads
    asked, dim, room, tile, tail = layer.asked, layer.dim, layer.room, layer.tile, layer.tail
    query, more = float_rows(scratch, asked, room), float_row(scratch + 4 * asked * room, room)
    weights = float_rows(scratch + 4 * (asked + 1) * room, asked, tile)
    tiles = scratch + 4 * ((asked + 1) * room + asked * tile)
    kept = float_rows(layer.weights + 4 * row * asked * tail, asked, tail)
    queries_of(layer, row, 0, query, more)
    begin = _unused(layer, batch_row)
    for place in range(asked):
        clear(kept[place], begin)
    for first in range(begin, tail, tile):
        count = min(tile, tail - first)
        start = batch_row * layer.key_row + head * layer.key_head + first * layer.key_token
        keys = unpacked(layer.tail_kind, layer.keys, start, layer.key_token, count, dim, room, tiles)
        for place in range(asked):
            logits = weights[place]
            products(query[place], keys, count, dim, logits)
            if layer.softcap > 0:
                for token in range(count):
                    logits[token] = capped(logits[token], layer.softcap)
            # A query does not see the tokens after its own.
            seen = tail - layer.queries + place % layer.queries + 1 - first
            for token in range(max(seen, 0), count):
                logits[token] = NOTHING
            for token in range(count):
                kept[place, first + token] = logits[token]
        start = batch_row * layer.value_row + head * layer.value_head + first * layer.value_token
        width = layer.value_dim
        values = unpacked(layer.tail_kind, layer.values, start, layer.value_token, count, width, room, tiles)
        fold(weights, values, asked, count, width, tops, totals, sums)


@njit(**FAST)
def join_row(layer, row, turn, scratch):
    """The row's output, and what every token of its tail received; its last item is the tail's.

    turn: the address of the rotation that turns back what its slots give, or 0.
    """
    first = long_row(layer.first, row + 2)
    batch_row, head = row // layer.kv_heads, row % layer.kv_heads
    asked, queries, dim = layer.asked, layer.queries, layer.value_dim
    own, kept = _unused(layer, batch_row), float_rows(layer.weights + 4 * row * asked * layer.tail, asked, layer.tail)
    group = asked // queries
    output = float_rows(layer.output, layer.rows * asked, dim)
    spare = float_rows(scratch, 2, layer.room)
    slots, turned = spare[0], spare[1]
    tail_tops, _, tail_sums = piece(layer, first[row + 1] - 1)
    if layer.mass:
        received = float_row(layer.mass + 4 * row * layer.tail, layer.tail)
        clear(received, layer.tail)
    for place in range(asked):
        query = place % queries
        top, total = tail_tops[place], float32(0)
        for item in range(first[row], first[row + 1]):
            top = max(top, piece(layer, item)[0][place])
        if layer.sinks:
            sink = float_row(layer.sinks, layer.kv_heads * group)[head * group + place // queries]
            top = max(top, sink)
            total += exponential(sink - top)
        clear(slots, dim)
        for item in range(first[row], first[row + 1] - 1):
            tops, totals, sums = piece(layer, item)
            part, given = exponential(tops[place] - top), sums[place]
            total += totals[place] * part
            for element in range(dim):
                slots[element] += part * given[element]
        if turn:
            products(slots, float_rows(turn, dim, dim), dim, dim, turned)
        else:
            turned = slots
        part = exponential(tail_tops[place] - top)
        total += piece(layer, first[row + 1] - 1)[1][place] * part
        # A query that sees nothing gives nothing, as padding does whose output nobody reads.
        whole = float32(0) if total == 0 else float32(1) / total
        into = output[(batch_row * queries + query) * layer.kv_heads * group + head * group + place // queries]
        for element in range(dim):
            into[element] = (turned[element] + part * tail_sums[place, element]) * whole
        if layer.mass and layer.tail - queries + query >= own:
            given = kept[place]
            for token in range(own, layer.tail):
                received[token] += exponential(given[token] - top) * whole
