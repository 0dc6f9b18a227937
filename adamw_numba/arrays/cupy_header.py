"""Where a CuPy array keeps what it is in its memory: found by looking at arrays of which everything is known.

CuPy has no C interface for that, and Python takes a microsecond to ask one array for its shape, strides and address. An
array of CuPy is an object of Cython whose fields have fixed places, which may be others in another version. So two
arrays are made, over memory that is never read, and the fields searched for what was put into them. If anything is not
found exactly once, nothing is: then arrays are asked by Python.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np

_WORD = 8
_MADE = (((3, 5, 7), "float32", 0x7_0000, 77), ((11, 2, 13), "float64", 0x9_0000, 91))  # shape, dtype, address, device
# What is found, in bytes: of the array shape, strides (each as the begin and the end of a vector), dtype and memory;
# of the memory address and device.
SHAPE, STRIDES, DTYPE, MEMORY, ADDRESS, DEVICE, FIELDS = range(7)


@cache
def fields(kind: type) -> np.ndarray[Any, Any] | None:
    """The places of the fields in arrays of a type; None where it is not CuPy's, or they have not been found."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not issubclass(kind, cupy.ndarray):
        return None
    try:
        (one, other) = (_fields_of(*_array(kind, *made)) for made in _MADE)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return np.array(one, np.int64) if one is not None and one == other else None


def _array(kind: Any, shape: tuple[int, ...], dtype: str, address: int, device: int) -> tuple[Any, int, int]:
    cuda = sys.modules["cupy"].cuda
    memory = cuda.MemoryPointer(cuda.UnownedMemory(address, 1 << 20, None, device), 0)
    return kind(shape, dtype, memory), address, device


def _fields_of(array: Any, address: int, device: int) -> list[int] | None:
    words, memory = _words_of(array), _words_of(array.data)
    found = [
        _vectors(words, array.shape),
        _vectors(words, array.strides),
        [k for k, word in enumerate(words) if word == id(array.dtype)],
        [k for k, word in enumerate(words) if word == id(array.data)],
        [k for k, word in enumerate(memory) if word == address],
        [k for k, word in enumerate(memory) if word & 0xFFFFFFFF == device],
    ]
    return [_WORD * k for (k,) in found] if all(len(each) == 1 for each in found) else None


def _words_of(thing: Any) -> Any:
    """The memory of an object, as words."""
    return (ctypes.c_int64 * (type(thing).__basicsize__ // _WORD)).from_address(id(thing))


def _vectors(words: Any, values: tuple[int, ...]) -> list[int]:
    """Where the begin and the end of a C++ vector of these values stand."""
    starts = [k for k in range(len(words) - 1) if words[k] > 0 and words[k + 1] - words[k] == _WORD * len(values)]
    return [k for k in starts if tuple((ctypes.c_int64 * len(values)).from_address(words[k])) == values]
