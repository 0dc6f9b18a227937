"""Norms of float32 gradients for a clip: the same in whatever order squares are added, and however arrays are cut.

A sum in float64, rounded to fewer bits, nearly always is. For the rare one that lies between two such numbers, there is
the exact sum. A float32 is an integer of 24 bits times a power of two that is at least 2^-149, so a sum of squares is a
large integer times 2^-298. It is kept as digits of 32 bits in words of 64, so that 2^31 can be added before any is
carried.
"""

import math

import numpy as np

from ..arrays.compiled import jit, jit_for_python, words_at
from ..arrays.runs import ARRAY, CHUNK, COUNT, G_AT, G_STEP, S_AT, S_STEP
from ..update import TOTAL, G
from . import blocks as b
from . import kernels as cpu
from .formula import row_of, slot_of

LEAST = -298  # the exponent of the sums' last bit
DIGITS = 20  # of 32 bits: squares of less than 2^256, and more than 2^80 of them
IN_CHUNK = CHUNK // cpu.LANES + int(math.log2(cpu.LANES))  # the most additions that an element's square goes through
_MASK = np.uint64(2**32 - 1)


@jit
def _add_square(digits, x):
    """Add the square of a float32."""
    bits = np.float32(x).view(np.uint32)
    exponent = np.int64((bits >> np.uint32(23)) & np.uint32(0xFF))
    mantissa = np.uint64(bits & np.uint32(0x7FFFFF))
    if exponent:
        mantissa |= np.uint64(0x800000)
        exponent -= 1
    at = 2 * exponent  # x is its mantissa times 2^(exponent - 149)
    square, k, shift = mantissa * mantissa, at >> 5, np.uint64(at & 31)
    low, high = (square & _MASK) << shift, (square >> np.uint64(32)) << shift
    digits[k] += np.int64(low & _MASK)
    digits[k + 1] += np.int64((low >> np.uint64(32)) + (high & _MASK))
    digits[k + 2] += np.int64(high >> np.uint64(32))


@jit
def _carry(digits):
    for k in range(digits.size - 1):
        digits[k + 1] += digits[k] >> 32
        digits[k] &= 0xFFFFFFFF


@jit_for_python
def add_squares(address, g_like, like, strided, accumulates, digits):
    """Add the squares of the gradients that a block tells of (see blocks.py) to those of their variables."""
    block = words_at(address)
    for w in range(block[b.CHUNKS]):
        work = b.row_of_work(block, w)
        a, n = work[ARRAY], work[COUNT]
        if b.address_in(block, G, a) == 0:
            continue
        c = b.coefficients_of(block, a, like)
        g = row_of(b.address_in(block, G, a) + work[G_AT], n, work[G_STEP], g_like, strided)
        total = slot_of(accumulates, b.address_in(block, TOTAL, a) + work[S_AT], n, work[S_STEP], like, strided)
        for i in range(n):
            _add_square(digits[a], cpu.gradient(g, total, i, c))
        _carry(digits[a])


@jit_for_python
def norms_of(digits):
    """The roots of sums, each a row of digits; rounded as `steady` does."""
    result = np.empty(len(digits))
    for a in range(len(digits)):
        own = digits[a]
        _carry(own)
        top = own.size - 1
        while top > 2 and own[top] == 0:
            top -= 1
        square = (own[top] * 2.0**32 + own[top - 1]) * 2.0**32 + own[top - 2]
        result[a] = _rounded(np.sqrt(square) * 2.0 ** ((LEAST + 32 * (top - 2)) // 2))
    return result


@jit
def _rounded(norm):
    """The first 31 bits of a number that is not negative, rounded."""
    bits = np.float64(norm).view(np.int64)
    return np.int64((bits + 0x200000) & ~np.int64(0x3FFFFF)).view(np.float64)


@jit_for_python
def steady(norm, additions):
    """A norm rounded to 31 bits: the same in whatever order its squares were added, or -1 where that is not certain.

    What follows from it is multiplied with numbers of float32, so nobody sees the difference. It is not certain where
    numbers as near to it as `additions` roundings in float64 can lead are rounded otherwise.
    """
    error = 2.0**-53 * (additions + 4)  # of the square: twice what is needed, with room for the root
    result = _rounded(norm * (1 - error))
    return result if result == _rounded(norm * (1 + error)) else -1.0


@jit_for_python
def steady_each(norms, additions):
    """The same of several, in place; whether one of them is not certain."""
    odd = False
    for a in range(norms.size):
        norms[a] = steady(norms[a], additions)
        odd = odd or norms[a] < 0
    return odd
