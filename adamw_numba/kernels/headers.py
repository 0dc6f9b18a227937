"""Addresses of many NumPy arrays in one compiled call, read from the arrays' own headers.

The header is the ``PyArrayObject_fields`` of NumPy's C API, whose layout NumPy promises to keep; Numba reads it too.
What is known of each array lies in one row of int64 (see `record`); an array that is not exactly as known is left to
the slower check in plan.py.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from .cpu import G, _cached, _pointer

_HEAD = object.__basicsize__  # bytes of PyObject_HEAD
_DATA, _NDIM, _SHAPE, _STRIDES, _DTYPE, _FLAGS = 0, 1, 2, 3, 5, 6
_LOW32 = 0xFFFFFFFF
ALIGNED, WRITEABLE = 0x100, 0x400


def record(flags: int, layout: Any, dtype: Any, low: int, high: int) -> list[int]:
    """What is known of an array: dtype, flags that must be set, extent relative to its address, shape, strides."""
    return [id(dtype), flags, low, high, len(layout.shape), *layout.shape, *layout.strides]


@_cached(njit)
def _words(address, count):
    return carray(_pointer(address, np.int64(0)), count)


@_cached(njit)
def _is_as_known(header, known):
    ndim = known[4]
    if header[_DTYPE] != known[0] or header[_NDIM] & _LOW32 != ndim or header[_FLAGS] & known[1] != known[1]:
        return False
    shape, strides = _words(header[_SHAPE], ndim), _words(header[_STRIDES], ndim)
    same = True
    for axis in range(ndim):
        same &= shape[axis] == known[5 + axis] and strides[axis] == known[5 + ndim + axis]
    return same


@_cached(njit)
def read(owned, places, gradients, none, known, starts, lows, highs, table):
    """Put the gradients' addresses into the table; False where a closer look is needed.

    `owned` holds the addresses of the Python objects that a step writes, variables and state, and `places` their rows
    and columns in the table; `gradients` those of the gradients, `none` that of ``None``; ``[lows, highs)`` are the
    ranges of memory that a step writes, in order.
    """
    for k in range(owned.size):
        header = _words(owned[k] + _HEAD, 7)
        if not _is_as_known(header, known[starts[k] :]) or header[_DATA] != table[places[k, 0], places[k, 1]]:
            return False
    for i in range(gradients.size):
        table[G, i] = 0
        if gradients[i] == none:
            continue
        header = _words(gradients[i] + _HEAD, 7)
        row = known[starts[owned.size + i] :]
        if not _is_as_known(header, row):
            return False
        nearest = np.searchsorted(highs, header[_DATA] + row[2], side="right")
        if nearest < lows.size and lows[nearest] < header[_DATA] + row[3]:
            return False
        table[G, i] = header[_DATA]
    return True
