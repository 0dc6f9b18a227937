"""Moments in 16 and 8 bits on the CPU: how the loop around the formula loads and stores them.

That loop stays one loop, whose integers are rounded while its division and root are under way. It goes through a block
at a time: in 8 bits the scales have to be known before (see `_scales`), and noise begins with a table for one block.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ..arrays.compiled import inlined, jit, pointer, words_at
from ..arrays.moments import BLOCK, WEYL, make_rounding
from ..update import M_SCALE, TOTAL, V_SCALE, Coefficients, G, M, V
from .blocks import APART, FIRST, KEY, SCALES, SEEDS, SPAN, STEP, WIDTH
from .formula import row_of, slot_of, update
from .intrinsics import widen
from .words import bits_of, choose, number_of, word

LIKE: dict[str, Any] = {"bfloat16": np.uint16(0), "8bit": np.uint8(0)}


_R = make_rounding(jit, word, bits_of, number_of, choose)
_key, _term, _noise, _to_bfloat, _from_bfloat, _scale_of, _inverse_of = _R[:7]
_to_momentum, _from_momentum, _to_velocity, _from_velocity = _R[7:]
# The terms of a block whose first is 0: to load and add them takes less than to compute them.
_TERMS = np.arange(BLOCK, dtype=np.uint32) * np.uint32(WEYL)


@inlined
def _bits_of_largest(x, count):
    """The bits of the largest magnitude; those of a NaN are larger than all others."""
    largest = np.uint32(0)
    if x is not None:
        for i in range(count):
            bits = np.uint32(bits_of(widen(x[i])) & np.uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
    return largest


@inlined
def _largest_code(codes, count, mask):
    largest = np.uint8(0)
    for i in range(count):
        code = np.uint8(codes[i] & mask)
        largest = code if code > largest else largest
    return np.uint32(largest)


@inlined
def _scales(m, v, g, total, count, limit, c, m_scale, v_scale):
    """The bits of the scales that a block will have.

    They have to be known before its first moment is rounded. The formula is monotone: of the largest magnitudes, it
    gives moments that no element can exceed.
    """
    up = np.float32(-1 if c.scale < 0 else 1)
    largest_g = up * number_of(_bits_of_largest(g, count))
    largest_total = None if total is None else up * number_of(_bits_of_largest(total, count))
    largest_m = _from_momentum(_largest_code(m, count, np.uint8(127))) * m_scale
    largest_v = _from_velocity(_largest_code(v, count, np.uint8(255))) * v_scale
    zero = np.float32(0)
    bounds = update(zero, largest_g, largest_m, largest_v, None, None, largest_total, limit, None, c)
    return _scale_of(bits_of(bounds[1])), _scale_of(bits_of(bounds[2]))


def find_scales(at, start, count, m, g_like, like, strided, accumulate, limit, c):
    """Find the new scales of the blocks of a span, where moments are of 8 bits, and keep the old ones.

    Of several blocks at once, since what leads to a scale is one thing after the other, and the processor can do those
    of several blocks at a time.
    """
    raise NotImplementedError


@overload(find_scales)
def _overload_find_scales(at, start, count, m, g_like, like, strided, accumulate, limit, c):
    if m == types.uint16:
        return lambda at, start, count, m, g_like, like, strided, accumulate, limit, c: None

    def find_scales(at, start, count, m, g_like, like, strided, accumulate, limit, c):
        record = words_at(at)
        m_scales, v_scales = pointer(record[M_SCALE], like), pointer(record[V_SCALE], like)
        for first in range(start, start + count, BLOCK):
            n, wide, k = min(BLOCK, start + count - first), first * record[WIDTH], first // BLOCK
            m = row_of(record[M] + (wide >> 2), n, record[STEP + M], np.uint8(0), strided)
            v = row_of(record[V] + (wide >> 2), n, record[STEP + V], np.uint8(0), strided)
            g = row_of(record[G] + first * record[STEP + G], n, record[STEP + G], g_like, strided)
            total = slot_of(accumulate, record[TOTAL] + wide, n, record[STEP + TOTAL], like, strided)
            m_bits, v_bits = _scales(m, v, g, total, n, limit, c, m_scales[k], v_scales[k])
            kept = _kept(at, first)
            kept[0], kept[1] = m_scales[k], v_scales[k]
            m_scales[k], v_scales[k] = number_of(m_bits), number_of(v_bits)
            kept[2], kept[3] = number_of(_inverse_of(m_bits)), number_of(_inverse_of(v_bits))

    return find_scales


@jit
def _kept(at, first):
    """What is known of the scales of a block: the old ones, and what new moments are multiplied with."""
    return pointer(at + 8 * SCALES + 16 * (first % SPAN // BLOCK), np.float32(0))


@jit
def find_key(record):
    """Find the key of the noise of a variable at a step."""
    record[KEY] = _key(np.uint32(record[SEEDS]), np.uint32(record[SEEDS + 2]), np.uint32(record[SEEDS + 1]))


@jit
def noise_from(record, first, strided):
    """The term of an element, and by how much the next one's is larger; None where those of `_TERMS` are meant."""
    place = record[FIRST] + first * record[APART]
    apart = None if strided is None else np.uint32(np.uint32(record[APART]) * np.uint32(WEYL))
    return _term(np.uint32(place), np.uint32(record[KEY])), apart


def new_scales(at, first, m):
    """What new moments of a block are multiplied with; nothing but in 8 bits."""
    raise NotImplementedError


@overload(new_scales)
def _overload_new_scales(at, first, m):
    if m == types.uint16:
        return lambda at, first, m: ()

    def new_scales(at, first, m):
        kept = _kept(at, first)
        return kept[2], kept[3]

    return new_scales


def betas_scaled(at, first, m, c):
    """The coefficients; where moments are of 8 bits, with a block's scales in what they are multiplied with.

    The products are the same, since scales are powers of two.
    """
    raise NotImplementedError


@overload(betas_scaled)
def _overload_betas_scaled(at, first, m, c):
    if m == types.uint16:
        return lambda at, first, m, c: c

    def betas_scaled(at, first, m, c):
        kept = _kept(at, first)
        beta_1, beta_2 = c.beta_1 * kept[0], c.beta_2 * kept[1]
        return Coefficients(*c[:4], beta_1, c.beta_1c, beta_2, *c[7:])

    return betas_scaled


@jit
def _bits_for(i, first, apart):
    """The noise of an element of a block; see `noise_from`."""
    term = np.uint32(first + _TERMS[i]) if apart is None else np.uint32(first + np.uint32(np.uint32(i) * apart))
    return _noise(term)


def momentum(m, i):
    """The first moment of an element; of 8 bits, before it is multiplied with the scale."""
    raise NotImplementedError


@overload(momentum, inline="always")
def _overload_momentum(m, i):
    if m.dtype == types.uint16:
        return lambda m, i: _from_bfloat(np.uint32(m[i]))
    if m.dtype == types.uint8:
        return lambda m, i: _from_momentum(np.uint32(m[i]))
    return lambda m, i: m[i]


def velocity(v, i):
    """The second moment of an element, likewise."""
    raise NotImplementedError


@overload(velocity, inline="always")
def _overload_velocity(v, i):
    if v.dtype == types.uint16:
        return lambda v, i: _from_bfloat(np.uint32(v[i]))
    if v.dtype == types.uint8:
        return lambda v, i: _from_velocity(np.uint32(v[i]))
    return lambda v, i: v[i]


def put(m, v, i, new_m, new_v, small):
    """Store the moments of an element."""
    raise NotImplementedError


@overload(put, inline="always")
def _overload_put(m, v, i, new_m, new_v, small):
    if m.dtype == types.uint16:

        def put(m, v, i, new_m, new_v, small):
            bits = _bits_for(i, small[0], small[1])
            m[i] = np.uint16(_to_bfloat(new_m, np.uint32(bits & np.uint32(0xFFFF))))
            v[i] = np.uint16(_to_bfloat(new_v, np.uint32(bits >> np.uint32(16))))

    elif m.dtype == types.uint8:

        def put(m, v, i, new_m, new_v, small):
            bits = _bits_for(i, small[0], small[1])
            m[i] = np.uint8(_to_momentum(new_m, small[2], bits))
            v[i] = np.uint8(_to_velocity(new_v, small[3], bits))

    else:

        def put(m, v, i, new_m, new_v, small):
            m[i] = new_m
            v[i] = new_v

    return put
