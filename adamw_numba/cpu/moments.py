"""Moments in 16 and 8 bits on the CPU: how the loop around the formula loads and stores them.

That loop stays one loop, whose integers are rounded while its division and root are under way. For 8 bits the scales of
a block have to be known before; see `_scales`.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ..arrays.compiled import cached, jit, pointer
from ..arrays.moments import BLOCK, make_rounding
from ..update import M_SCALE, TOTAL, V_SCALE, Coefficients, G, M, V
from .blocks import APART, FIRST, KEY, LENGTH, OLD_SCALES, SEEDS, STEP, WIDTH
from .formula import row_of, slot_of, update
from .intrinsics import widen
from .words import bits_of, choose, number_of, word

LIKE: dict[str, Any] = {"bfloat16": np.uint16(0), "8bit": np.uint8(0)}


_R = make_rounding(jit, word, bits_of, number_of, choose)
_key = _R.key
_noise, _to_bfloat, _from_bfloat, _scale_of, _inverse_of = _R[1:6]
_to_momentum, _from_momentum, _to_velocity, _from_velocity = _R[6:]


inlined = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


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


def prepare(record, m, g_like, like, strided, accumulate, limit, c):
    """What has to be done before any element of a span is rounded: find the key of its noise.

    Where moments are of 8 bits, find the new scales of its blocks too, and keep the old ones. Of several blocks at
    once, since what leads to a scale is one thing after the other, and the processor can do those of several blocks at
    a time.
    """
    raise NotImplementedError


@overload(prepare)
def _overload_prepare(record, m, g_like, like, strided, accumulate, limit, c):
    if m == types.uint16:

        def prepare(record, m, g_like, like, strided, accumulate, limit, c):
            _find_key(record)

    else:

        def prepare(record, m, g_like, like, strided, accumulate, limit, c):
            _find_key(record)
            m_scales, v_scales = pointer(record[M_SCALE], like), pointer(record[V_SCALE], like)
            kept = pointer(record[OLD_SCALES], like)
            for k in range((record[LENGTH] + BLOCK - 1) // BLOCK):
                first = k * BLOCK
                n, wide = min(BLOCK, record[LENGTH] - first), first * record[WIDTH]
                m = row_of(record[M] + (wide >> 2), n, record[STEP + M], np.uint8(0), strided)
                v = row_of(record[V] + (wide >> 2), n, record[STEP + V], np.uint8(0), strided)
                g = row_of(record[G] + first * record[STEP + G], n, record[STEP + G], g_like, strided)
                total = slot_of(accumulate, record[TOTAL] + wide, n, record[STEP + TOTAL], like, strided)
                m_bits, v_bits = _scales(m, v, g, total, n, limit, c, m_scales[k], v_scales[k])
                kept[4 * k], kept[4 * k + 1] = m_scales[k], v_scales[k]
                m_scales[k], v_scales[k] = number_of(m_bits), number_of(v_bits)
                kept[4 * k + 2], kept[4 * k + 3] = number_of(_inverse_of(m_bits)), number_of(_inverse_of(v_bits))

    return prepare


@jit
def _find_key(record):
    record[KEY] = _key(np.uint32(record[SEEDS]), np.uint32(record[SEEDS + 2]), np.uint32(record[SEEDS + 1]))


def described(record, m, strided):
    """What is to be known of a piece besides its moments; None where they are float32 or float64.

    The place of its first element in the whole variable, how far the next is from it (None where it is the next there,
    too), and the key of its noise. In 8 bits, where a piece is a block, also what new moments are multiplied with.
    """
    raise NotImplementedError


@overload(described)
def _overload_described(record, m, strided):
    if isinstance(m, types.Float):
        return lambda record, m, strided: None
    if m == types.uint16:
        return lambda record, m, strided: _noise_in(record, strided)

    def described(record, m, strided):
        kept = pointer(record[OLD_SCALES], np.float32(0))
        return (*_noise_in(record, strided), kept[2], kept[3])

    return described


@jit
def _noise_in(record, strided):
    apart = None if strided is None else np.uint32(record[APART])
    return np.uint32(record[FIRST]), apart, np.uint32(record[KEY])


@jit
def _place(i, first, apart):
    """The place of an element in the whole variable.

    Not the one before and a step more: LLVM would take the first element of each piece by itself.
    """
    return np.uint32(first + np.uint32(i)) if apart is None else np.uint32(first + np.uint32(np.uint32(i) * apart))


def betas_scaled(record, m, c):
    """The coefficients; where moments are of 8 bits, with a piece's scales in what they are multiplied with.

    The products are the same, since scales are powers of two.
    """
    raise NotImplementedError


@overload(betas_scaled)
def _overload_betas_scaled(record, m, c):
    if m != types.uint8:
        return lambda record, m, c: c

    def betas_scaled(record, m, c):
        kept = pointer(record[OLD_SCALES], np.float32(0))
        beta_1, beta_2 = c.beta_1 * kept[0], c.beta_2 * kept[1]
        return Coefficients(*c[:4], beta_1, c.beta_1c, beta_2, *c[7:])

    return betas_scaled


def momentum(m, i, small):
    """The first moment of an element; of 8 bits, before it is multiplied with the scale."""
    raise NotImplementedError


@overload(momentum, inline="always")
def _overload_momentum(m, i, small):
    if m.dtype == types.uint16:
        return lambda m, i, small: _from_bfloat(np.uint32(m[i]))
    if m.dtype == types.uint8:
        return lambda m, i, small: _from_momentum(np.uint32(m[i]))
    return lambda m, i, small: m[i]


def velocity(v, i, small):
    """The second moment of an element, likewise."""
    raise NotImplementedError


@overload(velocity, inline="always")
def _overload_velocity(v, i, small):
    if v.dtype == types.uint16:
        return lambda v, i, small: _from_bfloat(np.uint32(v[i]))
    if v.dtype == types.uint8:
        return lambda v, i, small: _from_velocity(np.uint32(v[i]))
    return lambda v, i, small: v[i]


def put(m, v, i, new_m, new_v, small):
    """Store the moments of an element."""
    raise NotImplementedError


@overload(put, inline="always")
def _overload_put(m, v, i, new_m, new_v, small):
    if m.dtype == types.uint16:

        def put(m, v, i, new_m, new_v, small):
            bits = _noise(_place(i, small[0], small[1]), small[2])
            m[i] = np.uint16(_to_bfloat(new_m, np.uint32(bits & np.uint32(0xFFFF))))
            v[i] = np.uint16(_to_bfloat(new_v, np.uint32(bits >> np.uint32(16))))

    elif m.dtype == types.uint8:

        def put(m, v, i, new_m, new_v, small):
            bits = _noise(_place(i, small[0], small[1]), small[2])
            m[i] = np.uint8(_to_momentum(new_m, small[3], bits))
            v[i] = np.uint8(_to_velocity(new_v, small[4], bits))

    else:

        def put(m, v, i, new_m, new_v, small):
            m[i] = new_m
            v[i] = new_v

    return put
