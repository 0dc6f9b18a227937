"""Sums over ranks."""

import numpy as np

from ..arrays.compiled import jit_for_python
from .intrinsics import widen

STORED = {"float16": np.int16, "bfloat16": np.uint16}  # as what compiled code sees elements of 16 bits


@jit_for_python
def add(part, is_first, divisor, result):
    """Add a part to a sum, or begin one with it, and then divide it; 16-bit floats, as their bits, become float32."""
    for i in range(result.size):
        x = widen(part[i])
        result[i] = x if is_first else result[i] + x
    if divisor != 1:
        for i in range(result.size):
            result[i] /= result.dtype.type(divisor)
