"""Torch's own threads, for code that torch did not compile.

A second pool of threads would wait for the processors on which torch's threads spin for their next work. On Linux these are
GNU OpenMP's (`libgomp`), and `GOMP_parallel` is how compiled programs hand them a function. Elsewhere one thread does the work.
"""

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache

import torch


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
        _CALL(function)(argument)
    else:
        pool(function, argument, count, 0)


_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64)
