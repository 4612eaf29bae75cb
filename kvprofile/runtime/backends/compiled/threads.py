"""Torch's own threads, for code that torch did not compile, and room to work in.

A second pool of threads would wait for the processors on which torch's threads spin for their next work. On Linux these are
GNU OpenMP's (`libgomp`), and `GOMP_parallel` is how compiled programs hand them a function. Elsewhere one thread does the work.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch


class _Room(threading.local):
    """What calls need beside their results; every thread of Python has its own, from one call to the next."""

    floats = np.empty(0, dtype=np.float32)
    address = 0


_room = _Room()


def room_for(floats: int) -> tuple[np.ndarray, int]:
    """So many float32 to work in, until the next call of the same thread, and their address.

    New memory in every call would cost more.
    """
    if len(_room.floats) < floats:
        _room.floats = np.empty(floats, dtype=np.float32)
        _room.address = _room.floats.ctypes.data
    return _room.floats, _room.address


@lru_cache(maxsize=1)
def _pool() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the library that torch has loaded, or None."""
    if not hasattr(os, "RTLD_NOLOAD") or "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        function = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def threads() -> int:
    """How many threads `in_parallel` runs a function in: torch's number, or one."""
    return torch.get_num_threads() if _pool() is not None else 1


def in_parallel(function: int, argument: int, count: int) -> None:
    """Call the function of one address, `void (int64)`, in `count` threads at once; the interpreter is free meanwhile."""
    pool = _pool()
    if pool is None or count < 2:
        _alone(function)(argument)
    else:
        pool(function, argument, count, 0)


@lru_cache(maxsize=8)
def _alone(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)
