"""The kernels of `triton_decode.py`: attention over pieces of the slots, and what joins them, the tail and sinks.

Flash decoding (https://pytorch.org/blog/flash-decoding) over ragged heads: a program reads one piece of one head's slots, and
the queries of the head's group are the rows of its tile. What codecs pack is unpacked in registers. Numbers that only the
device knows, or that change from step to step, never choose a kernel. Importing this module imports triton.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0917, PLR1714

import triton
import triton.language as tl

from kvprofile.runtime import blocks
from kvprofile.runtime.backends import triton_decode

# Triton's interpreter, for tests without a GPU, takes the bits of bfloat16 in a product for whole numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MASKED = tl.constexpr(blocks.MASKED)
PLAIN, INTEGERS = tl.constexpr(triton_decode.PLAIN), tl.constexpr(triton_decode.INTEGERS)
E4M3, LEVELS = tl.constexpr(triton_decode.E4M3), tl.constexpr(triton_decode.LEVELS)


@triton.jit
def _codes(packed, row, here, columns, dim: tl.constexpr, bits: tl.constexpr):
    """Codes of vectors `(slots, columns)`: `codecs/packing.py`. row: where every vector's bytes begin, `(slots, 1)`."""
    if bits == 8:
        seen = here[:, None] & (columns < dim)[None, :]
        codes = tl.load(packed + row + columns[None, :], mask=seen, other=0).to(tl.int32)
    elif bits == 2 or bits == 4:
        per: tl.constexpr = 8 // bits
        place = tl.arange(0, columns.shape[0] // per)
        seen = here[:, None] & (place < (dim + per - 1) // per)[None, :]
        symbols = tl.load(packed + row + place[None, :], mask=seen, other=0)
        if bits == 4:
            codes = tl.interleave(symbols & 15, symbols >> 4).to(tl.int32)
        else:
            even = tl.interleave(symbols & 3, symbols >> 4 & 3)
            codes = tl.interleave(even, tl.interleave(symbols >> 2 & 3, symbols >> 6)).to(tl.int32)
    else:
        # Symbols of 6 bits: three quarters of them in the low bits of a byte each, the last in the two high bits of all.
        per: tl.constexpr = 6 // bits
        quarter: tl.constexpr = ((dim + per - 1) // per + 3) // 4
        symbol = (columns // per)[None, :]
        last = symbol >= 3 * quarter
        place = tl.where(last, symbol - 3 * quarter, symbol)
        seen = here[:, None] & (columns < dim)[None, :]
        first = tl.load(packed + row + place, mask=seen, other=0).to(tl.int32)
        second = tl.load(packed + row + place + quarter, mask=seen & last, other=0).to(tl.int32)
        third = tl.load(packed + row + place + 2 * quarter, mask=seen & last, other=0).to(tl.int32)
        high = first >> 6 | (second >> 6) << 2 | (third >> 6) << 4
        codes = tl.where(last, high, first & 63) >> bits * (columns % per)[None, :] & (1 << bits) - 1
    return codes


@triton.jit
def _vectors(
    stored,
    scales,
    levels,
    slots,
    here,
    columns,
    dim: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    bits: tl.constexpr,
):
    """Vectors of some slots, `(slots, columns)`: plain ones in their own dtype, all others in float32."""
    row = slots[:, None] * width
    seen = here[:, None] & (columns < dim)[None, :]
    if kind == PLAIN:
        vectors = tl.load(stored + row + columns[None, :], mask=seen, other=0.0)
    elif kind == INTEGERS:
        scale = tl.load(scales + slots * 2, mask=here, other=0.0).to(tl.float32)
        centre = tl.load(scales + slots * 2 + 1, mask=here, other=0.0).to(tl.float32)
        codes = _codes(stored, row, here, columns, dim, bits).to(tl.float32)
        vectors = codes * scale[:, None] + (centre - ((1 << bits) - 1) / 2 * scale)[:, None]
    else:
        scale = tl.load(scales + slots, mask=here, other=0.0).to(tl.float32)[:, None]
        if kind == LEVELS:
            codes = _codes(stored, row, here, columns, dim, bits)
            vectors = tl.load(levels + codes) * scale
        else:
            # An 8-bit number's bits in float16's places: `codecs/floats.py`.
            number = tl.load(stored + row + columns[None, :], mask=seen, other=0).to(tl.int8, bitcast=True).to(tl.int16)
            if kind == E4M3:
                number, scale = (number << 7) & ~0x4000, scale * 256.0
            else:
                number = number << 8
            vectors = number.to(tl.float16, bitcast=True).to(tl.float32) * scale
    return vectors


@triton.jit
def _product(left, right, precision: tl.constexpr):
    """A matrix product in float32; numbers of one half precision are multiplied as they are."""
    if left.dtype == right.dtype and left.dtype != tl.float32 and not INTERPRETED:
        product = tl.dot(left, right)
    else:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=precision)
    return product


@triton.jit
def _capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`."""
    return softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)


@triton.jit
def _taken(logits, values, largest, total, output, precision: tl.constexpr):
    """Take some slots into a running softmax `(largest, total, output)`."""
    new = tl.maximum(largest, tl.max(logits, 1))
    kept = tl.exp(largest - new)
    weights = tl.exp(logits - new[:, None])
    total = total * kept + tl.sum(weights, 1)
    if precision != "ieee":
        weights = weights.to(values.dtype)
    return new, total, output * kept[:, None] + _product(weights, values, precision)


@triton.jit(do_not_specialize=["pieces", "first_piece", "splits"])
def slots_kernel(
    query,  # (rows, asked, dim): their products with stored keys, times `scaling`, are the logits up to shift, cap and bias
    shift,  # (rows, asked) float32
    keys,
    key_scales,
    key_levels,
    values,
    value_scales,
    value_levels,
    bias,  # (slots,)
    ends,  # (rows + 1,): where the room of every head begins
    held,  # (rows,): its slots
    output,  # (rows, pieces, asked, value_dim) float32
    sums,  # (rows, pieces, asked) float32
    scaling,
    softcap,
    pieces,
    first_piece,
    splits,
    asked: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    key_kind: tl.constexpr,
    key_bits: tl.constexpr,
    value_kind: tl.constexpr,
    value_bits: tl.constexpr,
    shifted: tl.constexpr,
    biased: tl.constexpr,
    capped: tl.constexpr,
    precision: tl.constexpr,
    rows_block: tl.constexpr,
    slots_block: tl.constexpr,
    dim_block: tl.constexpr,
    value_block: tl.constexpr,
):
    """Grid (rows, splits): attention over an equal part of a head's slots, and its log-sum-exp; zeros and `MASKED` of none.

    The splits are the pieces from `first_piece` on.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    count, room = tl.load(held + row), tl.load(ends + row).to(tl.int64)
    each = tl.cdiv(tl.cdiv(count, splits), slots_block) * slots_block
    low = split * each
    high = tl.minimum(low + each, count)
    one, columns, value_columns = tl.arange(0, rows_block), tl.arange(0, dim_block), tl.arange(0, value_block)
    asking = one < asked
    queries = tl.load(
        query + (row * asked + one)[:, None] * dim + columns[None, :],
        mask=asking[:, None] & (columns < dim)[None, :],
        other=0.0,
    )
    largest = tl.full([rows_block], MASKED, tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    mean = tl.zeros([rows_block, value_block], tl.float32)
    for start in range(low, high, slots_block):
        place = start + tl.arange(0, slots_block)
        here, slots = place < high, room + place
        key = _vectors(keys, key_scales, key_levels, slots, here, columns, dim, key_width, key_kind, key_bits)
        logits = _product(queries, tl.trans(key), precision) * scaling
        if shifted:
            logits += tl.load(shift + row * asked + one, mask=asking, other=0.0)[:, None]
        if capped:
            logits = _capped(logits, softcap)
        if biased:
            logits += tl.load(bias + slots, mask=here, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(here[None, :], logits, MASKED)
        value = _vectors(
            values,
            value_scales,
            value_levels,
            slots,
            here,
            value_columns,
            value_dim,
            value_width,
            value_kind,
            value_bits,
        )
        largest, total, mean = _taken(logits, value, largest, total, mean, precision)
    some = total > 0
    total = tl.where(some, total, 1.0)
    piece = (row * pieces + first_piece + split) * asked + one
    tl.store(
        output + piece[:, None] * value_dim + value_columns[None, :],
        mean / total[:, None],
        mask=asking[:, None] & (value_columns < value_dim)[None, :],
    )
    tl.store(sums + piece, tl.where(some, largest + tl.log(total), MASKED), mask=asking)


@triton.jit
def _tail_logits(
    queries,
    keys,
    tail,
    place,
    seen,
    columns,
    token,
    scaling,
    softcap,
    dim: tl.constexpr,
    capped: tl.constexpr,
    precision: tl.constexpr,
):
    """Logits over some tokens of the tail, `(asked, tokens)`; `MASKED` where `seen` is false."""
    mask = (place < tail)[:, None] & (columns < dim)[None, :]
    key = tl.load(keys + place[:, None] * token + columns[None, :], mask=mask, other=0.0)
    logits = _product(queries, tl.trans(key), precision) * scaling
    if capped:
        logits = _capped(logits, softcap)
    return tl.where(seen, logits, MASKED)


@triton.jit(do_not_specialize=["pieces", "tail"])
def layer_kernel(
    query,  # (rows, asked, dim)
    keys,  # (batch, kv_heads, tail, dim), with strides
    values,  # (batch, kv_heads, tail, value_dim), with strides
    unused,  # (batch,): the first columns of the tail that nobody sees
    sinks,  # (heads,)
    partial,  # (rows, pieces, asked, value_dim) float32
    sums,  # (rows, pieces, asked) float32
    output,  # (batch, queries, heads, value_dim)
    mass,  # (rows, tail) float32
    scaling,
    softcap,
    pieces,
    tail,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    kv_heads: tl.constexpr,
    queries_count: tl.constexpr,
    asked: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded: tl.constexpr,
    sunk: tl.constexpr,
    capped: tl.constexpr,
    weighed: tl.constexpr,
    precision: tl.constexpr,
    rows_block: tl.constexpr,
    slots_block: tl.constexpr,
    dim_block: tl.constexpr,
    value_block: tl.constexpr,
):
    """Grid (rows,): the tail, sinks and all pieces of a head under one softmax, and the attention that the tail received."""
    row = tl.program_id(0)
    batch, head = (row // kv_heads).to(tl.int64), row % kv_heads
    one, columns, value_columns = tl.arange(0, rows_block), tl.arange(0, dim_block), tl.arange(0, value_block)
    group: tl.constexpr = asked // queries_count
    asking = one < asked
    newest = tail - queries_count + one % queries_count  # the column of every query's own token
    oldest = tl.load(unused + batch) if padded else 0
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    asks = tl.load(
        query + (row * asked + one)[:, None] * dim + columns[None, :],
        mask=asking[:, None] & (columns < dim)[None, :],
        other=0.0,
    )
    largest = tl.full([rows_block], MASKED, tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    mean = tl.zeros([rows_block, value_block], tl.float32)
    for start in range(0, tail, slots_block):
        place = start + tl.arange(0, slots_block)
        seen = (place[None, :] <= newest[:, None]) & (place >= oldest)[None, :]
        logits = _tail_logits(
            asks, keys, tail, place, seen, columns, key_token, scaling, softcap, dim, capped, precision
        )
        mask = (place < tail)[:, None] & (value_columns < value_dim)[None, :]
        value = tl.load(values + place[:, None] * value_token + value_columns[None, :], mask=mask, other=0.0)
        largest, total, mean = _taken(logits, value, largest, total, mean, precision)
    if sunk:
        sink = tl.load(sinks + head * group + one // queries_count, mask=asking, other=0.0).to(tl.float32)
        new = tl.maximum(largest, sink)
        kept = tl.exp(largest - new)
        largest, total, mean = new, total * kept + tl.exp(sink - new), mean * kept[:, None]
    for piece in range(pieces):
        rows = (row * pieces + piece) * asked + one
        its_sum = tl.load(sums + rows, mask=asking, other=MASKED)
        its_mean = tl.load(
            partial + rows[:, None] * value_dim + value_columns[None, :],
            mask=asking[:, None] & (value_columns < value_dim)[None, :],
            other=0.0,
        )
        new = tl.maximum(largest, its_sum)
        kept, weight = tl.exp(largest - new), tl.exp(its_sum - new)
        largest, total = new, total * kept + weight
        mean = mean * kept[:, None] + its_mean * weight[:, None]
    token = batch * queries_count + one % queries_count
    shown = (token * kv_heads + head) * group + one // queries_count
    tl.store(
        output + shown[:, None] * value_dim + value_columns[None, :],
        (mean / total[:, None]).to(output.dtype.element_ty),
        mask=asking[:, None] & (value_columns < value_dim)[None, :],
    )
    if weighed:
        # Queries that are padding give none.
        giving = asking & (newest >= oldest)
        for start in range(0, tail, slots_block):
            place = start + tl.arange(0, slots_block)
            seen = (place[None, :] <= newest[:, None]) & (place >= oldest)[None, :]
            logits = _tail_logits(
                asks, keys, tail, place, seen, columns, key_token, scaling, softcap, dim, capped, precision
            )
            weights = tl.where(giving[:, None], tl.exp(logits - largest[:, None]) / total[:, None], 0.0)
            tl.store(mass + row * tail + place, tl.sum(weights, 0), mask=place < tail)
