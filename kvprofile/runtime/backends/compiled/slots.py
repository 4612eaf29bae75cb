"""One item of the kernel's work: a row's queries over some blocks of its slots."""

from numba import int64, njit

from kvprofile.runtime.backends.compiled.arithmetic import capped, fold, products
from kvprofile.runtime.backends.compiled.low_level import float_row, float_rows, int_row, long_row, shelves_at
from kvprofile.runtime.backends.compiled.reading import FAST, from_16_bits, vectors
from kvprofile.runtime.backends.compiled.records import FLOAT32


@njit(**FAST)
def clear(array, count):
    """Make the first numbers zero."""
    for place in range(count):
        array[place] = 0


@njit(**FAST)
def piece(layer, index):
    """An item's largest logits and sums of weights `(asked,)` each, and its outputs `(asked, value_dim)`."""
    asked = layer.asked
    address = layer.pieces + 4 * index * asked * (layer.value_dim + 2)
    tops, totals = float_row(address, asked), float_row(address + 4 * asked, asked)
    return tops, totals, float_rows(address + 8 * asked, asked, layer.value_dim)


@njit(**FAST)
def queries_of(layer, row, turn, into, spare):
    """A row's queries `(asked, dim)`, scaled, and turned by a matrix if its address is not 0."""
    dim = layer.dim
    for place in range(layer.asked):
        start, query = (row * layer.asked + place) * dim, into[place]
        if layer.query_kind == FLOAT32:
            asked = float_row(layer.query + 4 * start, dim)
            for element in range(dim):
                query[element] = asked[element]
        else:
            from_16_bits(layer.query_kind, layer.query + 2 * start, dim, query)
        for element in range(dim):
            query[element] *= layer.scaling
        if turn:
            matrix = float_rows(turn, dim, dim)
            for element in range(dim):
                spare[element] = query[element]
                query[element] = 0
            for element in range(dim):
                line, x = matrix[element], spare[element]
                for other in range(dim):
                    query[other] += x * line[other]


@njit(**FAST)
def of_slots(layer, item, scratch, tops, totals, sums):  # noqa: PLR0917
    """Attention over some blocks of a row's slots."""
    shelf = shelves_at(layer.shelf_table, item.shelf + 1)[item.shelf]
    asked, dim, room, tile = layer.asked, layer.dim, layer.room, layer.tile
    query, weights = float_rows(scratch, asked, room), float_rows(scratch + 4 * asked * room, asked, tile)
    spare = scratch + 4 * asked * (room + tile)
    bias, more = float_row(spare, tile), float_row(spare + 4 * tile, room)
    tiles = spare + 4 * (tile + room)
    shift = float_row(tiles, asked)
    tiles += 4 * asked
    if shelf.mean:
        queries_of(layer, item.row, 0, query, more)
        mean = float_rows(shelf.mean, layer.kv_heads, dim)
        for place in range(asked):
            products(
                query[place], mean[item.row % layer.kv_heads : item.row % layer.kv_heads + 1], 1, dim, shift[place:]
            )
    queries_of(layer, item.row, shelf.keys.turn, query, more)
    order = long_row(shelf.order, item.end)
    filled = int_row(shelf.filled, 1 << 40)
    for index in range(item.begin, item.end):
        block = order[index]
        count, first = int64(filled[block]), block * shelf.size
        keys = vectors(shelf.keys, first, count, dim, room, tiles)
        if shelf.bias:
            if shelf.bias_kind == FLOAT32:
                bias = float_row(shelf.bias + 4 * first, count)
            else:
                from_16_bits(shelf.bias_kind, shelf.bias + 2 * first, count, bias)
        for place in range(asked):
            logits = weights[place]
            products(query[place], keys, count, dim, logits)
            if shelf.mean:
                for slot in range(count):
                    logits[slot] += shift[place]
            if layer.softcap > 0:
                for slot in range(count):
                    logits[slot] = capped(logits[slot], layer.softcap)
            if shelf.bias:
                for slot in range(count):
                    logits[slot] += bias[slot]
        values = vectors(shelf.values, first, count, layer.value_dim, room, tiles)
        fold(weights, values, asked, count, layer.value_dim, tops, totals, sums)
