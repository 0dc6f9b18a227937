"""Moments in 16 and 8 bits on the CPU: how the loop around the formula loads and stores them.

That loop stays one loop, whose integers are rounded while its division and root are under way. For 8 bits the scales of
a block have to be known before; see `_scales`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..arrays.compiled import cached, jit, pointer
from ..arrays.moments import BLOCK, make_rounding
from ..arrays.runs import ARRAY, COUNT, G_AT, G_STEP, S_AT, S_STEP
from ..update import M_SCALE, TOTAL, V_SCALE, G, M, V
from .formula import row_of, slot_of, update
from .intrinsics import widen
from .words import bits_of, choose, number_of, word

SPAN = 8 * BLOCK  # elements whose scales are found together
LIKE: dict[str, Any] = {"bfloat16": np.uint16(0), "8bit": np.uint8(0)}


_R = make_rounding(jit, word, bits_of, number_of, choose)
keys = _R.keys
_noise, _to_bfloat, _from_bfloat, _scale_of, _inverse_of = _R[1:6]
_to_momentum, _from_momentum, _to_velocity, _from_velocity = _R[6:]


inlined = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


@intrinsic
def kept_scales(typingctx):
    """Room for the old scales of some blocks, and for the inverses of the new ones."""

    def codegen(context, builder, signature, args):
        numbers = ir.ArrayType(ir.FloatType(), 4 * SPAN // BLOCK)
        return builder.bitcast(cgutils.alloca_once(builder, numbers), ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(), codegen


def halvings(like, m_like):
    """How often the itemsize of other slots is halved to be that of moments: a constant."""
    raise NotImplementedError


@overload(halvings, inline="always")
def _overload_halvings(like, m_like):
    count = {8: 2, 16: 1}.get(getattr(m_like, "bitwidth", 0), 0) if isinstance(m_like, types.Integer) else 0
    return lambda like, m_like: count


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
    largest_m = _from_momentum(_largest_code(m, count, np.uint8(127)), m_scale)
    largest_v = _from_velocity(_largest_code(v, count, np.uint8(255)), v_scale)
    zero = np.float32(0)
    bounds = update(zero, largest_g, largest_m, largest_v, None, None, largest_total, limit, None, c)
    return _scale_of(bits_of(bounds[1])), _scale_of(bits_of(bounds[2]))


def prepare(m, kept, run, start, table, g_like, like, strided, accumulate, limit, c):
    """Where moments are of 8 bits, find the new scales of the next blocks of a run, and keep the old ones too.

    Of several blocks, since what leads to a scale is one thing after the other, and the processor can do those of
    several blocks at a time.
    """
    raise NotImplementedError


@overload(prepare)
def _overload_prepare(m, kept, run, start, table, g_like, like, strided, accumulate, limit, c):
    if m.dtype != types.uint8:
        return lambda m, kept, run, start, table, g_like, like, strided, accumulate, limit, c: None

    def prepare(m, kept, run, start, table, g_like, like, strided, accumulate, limit, c):
        a, k = run[ARRAY], 0
        for first in range(start, min(start + SPAN, run[COUNT]), BLOCK):
            n, at = min(BLOCK, run[COUNT] - first), run[S_AT] + first * run[S_STEP]
            m = row_of(table[M, a] + (at >> 2), n, run[S_STEP] >> 2, np.uint8(0), strided)
            v = row_of(table[V, a] + (at >> 2), n, run[S_STEP] >> 2, np.uint8(0), strided)
            g = row_of(table[G, a] + run[G_AT] + first * run[G_STEP], n, run[G_STEP], g_like, strided)
            total = slot_of(accumulate, table[TOTAL, a] + at, n, run[S_STEP], like, strided)
            # Four bytes of a scale for each block, where an element has four in other slots.
            m_at, v_at = pointer(table[M_SCALE, a] + at // BLOCK, like), pointer(table[V_SCALE, a] + at // BLOCK, like)
            m_bits, v_bits = _scales(m, v, g, total, n, limit, c, m_at[0], v_at[0])
            kept[k], kept[k + 1] = m_at[0], v_at[0]
            m_at[0], v_at[0] = number_of(m_bits), number_of(v_bits)
            kept[k + 2], kept[k + 3] = number_of(_inverse_of(m_bits)), number_of(_inverse_of(v_bits))
            k += 4

    return prepare


def described(m, kept, start, places, keys):
    """What is to be known of a piece besides its moments; None where they are float32 or float64.

    The place of its first element in the whole variable, how far the next is from it, and what noise follows from. In 8
    bits, where a piece is a block, its scales as well, and what new moments are multiplied with.
    """
    raise NotImplementedError


@overload(described)
def _overload_described(m, kept, start, places, keys):
    if isinstance(m.dtype, types.Float):
        return lambda m, kept, start, places, keys: None
    if m.dtype == types.uint16:

        def described(m, kept, start, places, keys):
            return np.uint32(places[0]), np.uint32(places[1]), keys[0], keys[1]

    else:

        def described(m, kept, start, places, keys):
            k = 4 * (start % SPAN // BLOCK)
            noise = np.uint32(places[0]), np.uint32(places[1]), keys[0], keys[1]
            return (*noise, kept[k], kept[k + 1], kept[k + 2], kept[k + 3])

    return described


@jit
def first_place(small):
    """Where the first element of a piece is in the whole variable."""
    return None if small is None else small[0]


def momentum(m, i, small):
    """The first moment of an element."""
    raise NotImplementedError


@overload(momentum, inline="always")
def _overload_momentum(m, i, small):
    if m.dtype == types.uint16:
        return lambda m, i, small: _from_bfloat(np.uint32(m[i]))
    if m.dtype == types.uint8:
        return lambda m, i, small: _from_momentum(np.uint32(m[i]), small[4])
    return lambda m, i, small: m[i]


def velocity(v, i, small):
    """The second moment of an element."""
    raise NotImplementedError


@overload(velocity, inline="always")
def _overload_velocity(v, i, small):
    if v.dtype == types.uint16:
        return lambda v, i, small: _from_bfloat(np.uint32(v[i]))
    if v.dtype == types.uint8:
        return lambda v, i, small: _from_velocity(np.uint32(v[i]), small[5])
    return lambda v, i, small: v[i]


def put(m, v, i, new_m, new_v, place, small):
    """Store the moments of an element; returns the place of the next one."""
    raise NotImplementedError


@overload(put, inline="always")
def _overload_put(m, v, i, new_m, new_v, place, small):
    if m.dtype == types.uint16:

        def put(m, v, i, new_m, new_v, place, small):
            bits = _noise(place, small[2], small[3])
            m[i] = np.uint16(_to_bfloat(new_m, np.uint32(bits & np.uint32(0xFFFF))))
            v[i] = np.uint16(_to_bfloat(new_v, np.uint32(bits >> np.uint32(16))))
            return np.uint32(place + small[1])

    elif m.dtype == types.uint8:

        def put(m, v, i, new_m, new_v, place, small):
            bits = _noise(place, small[2], small[3])
            m[i] = np.uint8(_to_momentum(new_m, small[6], bits))
            v[i] = np.uint8(_to_velocity(new_v, small[7], bits))
            return np.uint32(place + small[1])

    else:

        def put(m, v, i, new_m, new_v, place, small):
            m[i] = new_m
            v[i] = new_v

    return put
