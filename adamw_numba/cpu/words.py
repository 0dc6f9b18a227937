"""Words of 32 bits on the CPU: what formulas of bits are bound to (see arrays/moments.py and arrays/masters.py)."""

import numpy as np

from ..arrays.compiled import jit


@jit
def word(x):
    return np.uint32(x)


@jit
def bits_of(x):
    return np.float32(x).view(np.uint32)


@jit
def number_of(x):
    return np.uint32(x).view(np.float32)


@jit
def choose(condition, yes, no):
    return yes if condition else no
