"""Words of whole-array functions: unsigned integers of 32 bits, or int64 in torch, which does not add uint32.

Formulas of bits (see arrays/moments.py and arrays/masters.py) are bound to them.
"""

import struct
from typing import Any

import array_api_compat
import numpy as np

from ..arrays import Array

MASK = 0xFFFFFFFF


def bindings(xp: Any) -> tuple[Any, ...]:
    """What `make_rounding` and `make_splitting` take."""
    return (
        lambda function: function,
        lambda x: word_of(xp, x),
        lambda x: bits_of(xp, x),
        lambda x: number_of(xp, x),
        xp.where,
    )


def _has_words(xp: Any) -> bool:
    return not array_api_compat.is_torch_namespace(xp)


def words(xp: Any, x: Any) -> Any:
    """A Python integer, or an array of integers, as words."""
    if not _has_words(xp):
        return x if isinstance(x, int) else xp.astype(x, xp.int64) & MASK
    return xp.asarray(x, dtype=xp.uint32) if isinstance(x, int) else xp.astype(x, xp.uint32)


def word_of(xp: Any, x: Any) -> Any:
    """What an operation on words gives, as a word: uint32 has wrapped already."""
    if isinstance(x, int):
        return words(xp, x & MASK)
    return x if _has_words(xp) else x & MASK


def bits_of(xp: Any, x: Any) -> Any:
    """The bits of float32 numbers, as words."""
    if _has_words(xp):
        return _viewed(xp, xp.astype(x, xp.float32), xp.uint32)
    return words(xp, x.to(xp.float32).contiguous().view(xp.int32))


def number_of(xp: Any, bits: Any) -> Any:
    """The float32 numbers of words."""
    if isinstance(bits, int):
        return xp.asarray(struct.unpack("f", struct.pack("I", bits))[0], dtype=xp.float32)
    if _has_words(xp):
        return _viewed(xp, bits, xp.float32)
    return xp.where(bits > 0x7FFFFFFF, bits - 2**32, bits).to(xp.int32).view(xp.float32)


def _viewed(xp: Any, x: Array, dtype: Any) -> Array:
    """An array's bits as another dtype: by its own method or, where the standard has none, by way of NumPy."""
    if hasattr(x, "view"):
        return x.view(dtype)
    name = str(dtype).rpartition(".")[2]
    return xp.asarray(np.array(x).view(name))
