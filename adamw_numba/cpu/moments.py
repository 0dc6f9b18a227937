"""Moments in 16 and 8 bits on the CPU: brought into float32 for a piece of a run, and rounded back.

What is brought in lies in the first-level cache, so that the loop around the formula stays the one of float32, and all
three loops become vectors; there is far more time for them than memory takes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..arrays.compiled import cached, jit
from ..moments import BLOCK, make_rounding

PIECE = 128  # elements that are brought in together
LIKE: dict[str, Any] = {"bfloat16": np.uint16(0), "8bit": np.uint8(0)}


@jit
def _word(x):
    return np.uint32(x)


@jit
def _bits_of(x):
    return np.float32(x).view(np.uint32)


@jit
def _number_of(x):
    return np.uint32(x).view(np.float32)


@jit
def _choose(condition, yes, no):
    return yes if condition else no


_R = make_rounding(jit, _word, _bits_of, _number_of, _choose)
keys = _R.keys
_noise, _to_bfloat, _from_bfloat, _scale_of, _inverse_of = _R[1:6]
_to_momentum, _from_momentum, _to_velocity, _from_velocity = _R[6:]


@intrinsic
def scratch(typingctx):
    """A block of float32 of a function's own, which LLVM knows to overlap with nothing."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(
            cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), PIECE)), ir.FloatType().as_pointer()
        )

    return types.CPointer(types.float32)(), codegen


inlined = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


def halvings(like, m_like):
    """How often the itemsize of other slots is halved to be that of moments: a constant."""
    raise NotImplementedError


@overload(halvings, inline="always")
def _overload_halvings(like, m_like):
    count = {8: 2, 16: 1}.get(getattr(m_like, "bitwidth", 0), 0) if isinstance(m_like, types.Integer) else 0
    return lambda like, m_like: count


def noise_of(m, place, step, keys):
    """What the noise of a run follows from, where moments of its kind are rounded; else None."""
    raise NotImplementedError


@overload(noise_of, inline="always")
def _overload_noise_of(m, place, step, keys):
    if isinstance(m.dtype, types.Float):
        return lambda m, place, step, keys: None
    return lambda m, place, step, keys: (np.uint32(place), np.uint32(step), keys[0], keys[1])


@jit
def first_place(noise):
    """Where the first element of a run is in the whole variable."""
    return None if noise is None else noise[0]


def put_moments(m, v, i, new_m, new_v, place, noise):
    """Store the moments of an element; returns the place of the next one."""
    raise NotImplementedError


@overload(put_moments, inline="always")
def _overload_put_moments(m, v, i, new_m, new_v, place, noise):
    if m.dtype == types.uint16:

        def put_moments(m, v, i, new_m, new_v, place, noise):
            bits = _noise(place, noise[2], noise[3])
            m[i] = np.uint16(_to_bfloat(new_m, np.uint32(bits & np.uint32(0xFFFF))))
            v[i] = np.uint16(_to_bfloat(new_v, np.uint32(bits >> np.uint32(16))))
            return np.uint32(place + noise[1])

    else:

        def put_moments(m, v, i, new_m, new_v, place, noise):
            m[i] = new_m
            v[i] = new_v
            return place

    return put_moments


def brought_in(stored, scales, values, count, signed):
    """Moments of a piece as they are updated: themselves, or those of 8 bits, with the scales of blocks, as `values`."""
    raise NotImplementedError


def round_back(m, v, m_scales, v_scales, new_m, new_v, count, noise):
    """Store the moments of 8 bits of a piece."""
    raise NotImplementedError


@inlined
def _bring_block(stored, scale, values, start, count, signed):
    for i in range(count):
        code = np.uint32(stored[i])
        values[start + i] = _from_velocity(code, scale) if signed is None else _from_momentum(code, scale)


@overload(brought_in)
def _overload_brought_in(stored, scales, values, count, signed):
    if stored.dtype != types.uint8:
        return lambda stored, scales, values, count, signed: stored

    def brought_in(stored, scales, values, count, signed):
        blocks = count // BLOCK
        for k in range(blocks):
            _bring_block(stored[k * BLOCK :], scales[k], values, k * BLOCK, BLOCK, signed)
        if blocks * BLOCK < count:
            at = blocks * BLOCK
            _bring_block(stored[at:], scales[blocks], values, at, count - at, signed)
        return values

    return brought_in


@inlined
def _magnitude(x):
    return np.uint32(_bits_of(x) & np.uint32(0x7FFFFFFF))


@inlined
def _round_block(m, v, scales, new_m, new_v, start, count, noise):
    m_largest = v_largest = np.uint32(0)
    for i in range(count):  # the bits of a NaN are larger than all others
        m_bits, v_bits = _magnitude(new_m[start + i]), _magnitude(new_v[start + i])
        m_largest = m_bits if m_bits > m_largest else m_largest
        v_largest = v_bits if v_bits > v_largest else v_largest
    m_scale, v_scale = _scale_of(m_largest), _scale_of(v_largest)
    scales[0][0], scales[1][0] = _number_of(m_scale), _number_of(v_scale)
    m_inverse, v_inverse = _inverse_of(m_scale), _inverse_of(v_scale)
    at = np.uint32(noise[0] + np.uint32(start))
    for i in range(count):
        bits = _noise(np.uint32(at + np.uint32(i)), noise[2], noise[3])
        m[i] = np.uint8(_to_momentum(new_m[start + i], m_inverse, np.uint32(bits & np.uint32(0xFFFF))))
        v[i] = np.uint8(_to_velocity(new_v[start + i], v_inverse, np.uint32(bits >> np.uint32(16))))


@overload(round_back)
def _overload_round_back(m, v, m_scales, v_scales, new_m, new_v, count, noise):
    if m.dtype != types.uint8:
        return lambda m, v, m_scales, v_scales, new_m, new_v, count, noise: None

    def round_back(m, v, m_scales, v_scales, new_m, new_v, count, noise):
        blocks = count // BLOCK
        for k in range(blocks):
            at, own = k * BLOCK, (m_scales[k:], v_scales[k:])
            _round_block(m[at:], v[at:], own, new_m, new_v, at, BLOCK, noise)
        at, own = blocks * BLOCK, (m_scales[blocks:], v_scales[blocks:])
        if at < count:
            _round_block(m[at:], v[at:], own, new_m, new_v, at, count - at, noise)

    return round_back
