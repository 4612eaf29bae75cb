"""What numba has no word for: an array from an address, a float from its bits, a counter for many threads."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from kvprofile.runtime.backends.compiled.records import ITEM, LAYER, SHELF


def _arrays(dtype: Any, dims: int) -> Any:
    """A function of an address and `dims` sizes: the array there; `carray` does the same, and takes longer to compile."""
    kind = types.Array(from_dtype(np.dtype(dtype)), dims, "C")
    whole = types.int64

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        array = make_array(kind)(context, builder)
        size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        strides = [context.get_constant(types.intp, size)]
        if dims == 2:
            strides.insert(0, builder.mul(arguments[2], strides[0]))
        data = builder.inttoptr(arguments[0], context.get_data_type(kind.dtype).as_pointer())
        shape, strides = (cgutils.pack_array(builder, part) for part in (arguments[1:], strides))
        populate_array(array, data, shape, strides, context.get_constant(types.intp, size), None)
        return array._getvalue()

    if dims == 1:
        return intrinsic(lambda _context, address, count: (kind(whole, whole), generate))
    return intrinsic(lambda _context, address, rows, width: (kind(whole, whole, whole), generate))


float_row, float_rows = _arrays(np.float32, 1), _arrays(np.float32, 2)
short_row, byte_row = _arrays(np.uint16, 1), _arrays(np.uint8, 1)
int_row, long_row = _arrays(np.int32, 1), _arrays(np.int64, 1)
items_at, shelves_at, layers_at = _arrays(ITEM, 1), _arrays(SHELF, 1), _arrays(LAYER, 1)


@intrinsic
def float_of(_context: Any, _bits: Any) -> Any:
    """The float32 whose bits are those of an int32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def counted(_context: Any, _address: Any, _by: Any) -> Any:
    """Add to the int64 at an address, and return what was there before; no two threads get the same."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate
