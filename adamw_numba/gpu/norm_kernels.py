"""The norms of gradients on a GPU: sums of squares, their roots, and what follows from them, in three launches.

The first launch takes every gradient in fixed chunks, the second adds up each array's chunks in order, and the third,
one block of threads, decides on the step and on what each gradient is multiplied with. Sums are of float64, and the
order of every addition is fixed, so equal gradients have equal norms.

The square of a large or small float64 does not fit a float64. So three sums are kept, of the squares of ordinary
numbers, of large ones made smaller and of small ones made larger by a power of two (Blue 1978, "A portable Fortran
program to find the Euclidean norm of a vector"). The square of any float32 does fit.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from ..update import TOTAL, G, M, accumulate
from . import memory, parts
from .memory import ACCESS, FLOATS, SIZES, device_function, scalar_function
from .parts import entry, put_entry
from .words import (
    ARRAY,
    ARRAYS,
    CLIPNORM,
    CONTROL,
    G_AT,
    G_STEP,
    GLOBAL_CLIPNORM,
    GO,
    NORM,
    NORM_FACTOR,
    NORMS,
    PARTIALS,
    RANGES,
    S_AT,
    S_STEP,
    SCALE,
    SCALES,
    SCALES_DOUBLE,
    SQUARE_CHUNKS,
    SQUARE_ENDS,
    SQUARES,
    STILL,
    THREADS,
)

_BIG, _SMALL, _RESCUE = 2.0**480, 2.0**-480, 2.0**-600  # where squares of float64 would over- or underflow
_LARGEST = 1.7976931348623157e308
_SUMS = 24  # bytes of three sums

_accumulate = scalar_function(accumulate)
_get, _put = memory.number("float64")
_put_single = memory.number("float32")[1]
_row_at, _ = parts.coefficients_in("float64")  # decisions are made in float64 for all


class Sums(NamedTuple):
    """Sums of squares, of ordinary numbers, of large ones times `_RESCUE`, and of small ones over it."""

    middle: float
    big: float
    small: float


@cache
def square_kernel(g_type: str, compute: str, accumulates: bool):
    """`square_function`, compiled for the current device."""
    return parts.kernel(square_function(g_type, compute, accumulates))


@cache
def norm_kernel():
    """`norm_function`, compiled for the current device."""
    return parts.kernel(norm_function)


@cache
def decision_kernel():
    """`decision_function`, compiled for the current device."""
    return parts.kernel(decision_function)


def square_function(g_type: str, compute: str, accumulates: bool):
    """The kernel that sums the squares of each chunk: of the gradients, or of the sums of the window with them."""
    row_at, coefficients = parts.coefficients_in(compute)
    get = memory.number(compute)[0]
    sums_of_chunk = _sums_of_chunk(g_type, compute, accumulates)
    of_all_lanes = _all_of_all_lanes if compute == "float64" else _middle_of_all_lanes

    def square_kernel(group, flags, table):
        lanes = cuda.shared.array(THREADS, types.float64)
        # Norms are taken before anybody knows if the step will count: without a row, any will do, as nothing follows.
        row = row_at(group, max(parts.row_index(group, flags & STILL), 0))
        c = coefficients(row, False, get(row))
        ends, chunks, chunk = entry(group, SQUARE_ENDS), entry(group, SQUARE_CHUNKS), np.int64(cuda.blockIdx.x)
        while chunk < chunks:
            run, begin, end = parts.elements_of(group, ends, chunk, SQUARES)
            sums = of_all_lanes(sums_of_chunk(group, table, run, begin, end, c), lanes)
            if cuda.threadIdx.x == 0:
                _put_sums(entry(group, PARTIALS) + _SUMS * chunk, sums)
            chunk += cuda.gridDim.x

    return square_kernel


def _sums_of_chunk(g_type, compute, accumulates):
    """The squares of a chunk that one thread of the block sums."""
    width, dtype = ACCESS // SIZES[g_type], FLOATS[compute]
    load = _load_lanes(g_type, compute, accumulates, width)
    with_square = _with_rescued_square if compute == "float64" else _with_square
    total = TOTAL if accumulates else M  # which is not read

    @device_function
    def sums_of_chunk(group, table, run, begin, end, c):
        column, arrays = table + 8 * entry(run, ARRAY), entry(group, ARRAYS)
        sums, x = Sums(0.0, 0.0, 0.0), cuda.local.array(width, dtype)
        if entry(column, arrays * G) == 0:
            return sums
        at = entry(column, arrays * G) + entry(run, G_AT), entry(column, arrays * total) + entry(run, S_AT)
        i = begin + cuda.threadIdx.x * width
        while i < end:
            load(x, at, (entry(run, G_STEP), entry(run, S_STEP)), i, end, c)
            for k in range(width):
                sums = with_square(sums, np.float64(x[k]))
            i += THREADS * width
        return sums

    return sums_of_chunk


@scalar_function
def _with_square(sums, x):
    return Sums(sums.middle + x * x, sums.big, sums.small)


@scalar_function
def _with_rescued_square(sums, x):
    if abs(x) > _BIG:
        return Sums(sums.middle, sums.big + (x * _RESCUE) * (x * _RESCUE), sums.small)
    if abs(x) < _SMALL:
        return Sums(sums.middle, sums.big, sums.small + (x / _RESCUE) * (x / _RESCUE))
    return Sums(sums.middle + x * x, sums.big, sums.small)  # also NaN


def _load_lanes(g_type, compute, accumulates, width):
    """Load neighbours of what the norm is of, from element i on; zeros after the end."""
    g_size, size, dtype = SIZES[g_type], SIZES[compute], FLOATS[compute]
    load_many, load_one = _load(g_type, compute, accumulates, width), _load(g_type, compute, accumulates, 1)

    @scalar_function
    def is_aligned(g, total, g_step, step):
        return g_step == g_size and g % ACCESS == 0 and (not accumulates or (step == size and total % ACCESS == 0))

    @device_function
    def load_lanes(x, at, steps, i, end, c):
        one = cuda.local.array(1, dtype)
        (g, total), (g_step, step) = (at[0] + i * steps[0], at[1] + i * steps[1]), steps
        if is_aligned(g, total, g_step, step) and i + width <= end:
            load_many(x, g, total, c)
        else:
            for k in range(width):
                x[k] = 0
                if i + k < end:
                    load_one(one, g + k * g_step, total + k * step, c)
                    x[k] = one[0]

    return load_lanes


def _load(g_type, compute, accumulates, width):
    """Load neighbours of a gradient, added to the sum of the window where there is one."""
    load_g, load_total = memory.elements(g_type, width, False)[0], memory.elements(compute, width, True)[0]
    dtype = FLOATS[compute]

    @scalar_function
    def load(x, g, total, c):
        load_g(x, g)

    @device_function
    def load_sum(x, g, total, c):
        totals = cuda.local.array(width, dtype)
        load_g(x, g)
        load_total(totals, total)
        for k in range(width):
            x[k] = _accumulate(totals[k], x[k], c)

    return load_sum if accumulates else load


def _over_lanes(combine):
    """Combine one number of each thread of a block, in a fixed tree; every thread gets the result."""

    @device_function
    def over_lanes(x, lanes):
        lanes[cuda.threadIdx.x] = x
        width = THREADS // 2
        cuda.syncthreads()
        while width > 0:
            if cuda.threadIdx.x < width:
                lanes[cuda.threadIdx.x] = combine(lanes[cuda.threadIdx.x], lanes[cuda.threadIdx.x + width])
            cuda.syncthreads()
            width //= 2
        result = lanes[0]
        cuda.syncthreads()  # the next use of the lanes may not begin before all have read this
        return result

    return over_lanes


_sum_of_lanes = _over_lanes(scalar_function(lambda one, other: one + other))
_most_of_lanes = _over_lanes(scalar_function(lambda one, other: np.maximum(one, other)))  # NaN if one is


@device_function
def _all_of_all_lanes(sums, lanes):
    return Sums(_sum_of_lanes(sums.middle, lanes), _sum_of_lanes(sums.big, lanes), _sum_of_lanes(sums.small, lanes))


@device_function
def _middle_of_all_lanes(sums, lanes):
    return Sums(_sum_of_lanes(sums.middle, lanes), sums.big, sums.small)


@scalar_function
def _put_sums(at, sums):
    _put(at, sums.middle)
    _put(at + 8, sums.big)
    _put(at + 16, sums.small)


def norm_function(group, flags, table):
    """The kernel, of one block per array, that adds each array's sums of squares and takes the root."""
    lanes = cuda.shared.array(THREADS, types.float64)
    a = np.int64(cuda.blockIdx.x)
    partials, own = entry(group, PARTIALS), entry(group, RANGES) + 16 * a
    first, last = entry(own, 0), entry(own, 1)
    middle = _sum_of_partials(partials, first, last, lanes)
    big = _sum_of_partials(partials + 8, first, last, lanes)
    small = _sum_of_partials(partials + 16, first, last, lanes)
    if cuda.threadIdx.x == 0:
        _put(entry(group, NORMS) + 8 * a, _root_of(Sums(middle, big, small)))


@device_function
def _sum_of_partials(partials, first, last, lanes):
    total = np.float64(0)
    k = first + cuda.threadIdx.x
    while k < last:
        total += _get(partials + _SUMS * k)
        k += THREADS
    return _sum_of_lanes(total, lanes)


@scalar_function
def _root_of(sums):
    """The root of three sums: the smaller ones count only where the larger ones are 0."""
    middle, big, small = sums.middle, sums.big, sums.small
    if big > 0:
        norm = math.sqrt(big + middle * _RESCUE * _RESCUE) / _RESCUE
    elif middle > 0 or middle != middle:
        norm = math.sqrt(middle + small * _RESCUE * _RESCUE)
    else:
        norm = math.sqrt(small) * _RESCUE
    if norm == math.inf and big < math.inf and middle < math.inf:
        return _LARGEST  # every element is finite, so the step must not be taken for one that is not
    return norm


def decision_function(group, flags, table):
    """The kernel, of one block, that decides on the step and on what each gradient is multiplied with."""
    lanes = cuda.shared.array(THREADS, types.float64)
    index = max(parts.row_index(group, flags & STILL), 0)
    row, control = _row_at(group, index), entry(group, CONTROL)
    whole = _whole_norm(entry(group, NORMS), entry(group, ARRAYS), lanes) * _get(row + 8 * NORM_FACTOR)
    if cuda.threadIdx.x == 0:
        _put(control + 8 * NORM, whole)
        put_entry(control, GO, 1 if whole - whole == 0 else 0)  # not of an infinity, nor of NaN
    a = np.int64(cuda.threadIdx.x)
    while a < entry(group, ARRAYS):
        scale = _get(row + 8 * SCALE) * _clip_of(row, whole, _get(entry(group, NORMS) + 8 * a))
        _put(entry(group, SCALES_DOUBLE) + 8 * a, scale)
        _put_single(entry(group, SCALES) + 4 * a, np.float32(scale))
        a += THREADS


@device_function
def _whole_norm(norms, arrays, lanes):
    """The norm of norms, safe from overflow: the largest is taken out of the root."""
    largest, total = np.float64(0), np.float64(0)
    a = np.int64(cuda.threadIdx.x)
    while a < arrays:
        largest = np.maximum(largest, _get(norms + 8 * a))
        a += THREADS
    largest = _most_of_lanes(largest, lanes)
    if not 0 < largest < math.inf:
        return largest
    a = np.int64(cuda.threadIdx.x)
    while a < arrays:
        part = _get(norms + 8 * a) / largest
        total += part * part
        a += THREADS
    return min(largest * math.sqrt(_sum_of_lanes(total, lanes)), _LARGEST)


@scalar_function
def _clip_of(row, whole, norm):
    """What clipping by norm multiplies a gradient with; NaN if the whole norm is not finite, as in Keras."""
    each, limit = _get(row + 8 * CLIPNORM), _get(row + 8 * GLOBAL_CLIPNORM)
    if limit > 0:
        return limit / np.maximum(whole, limit) + (whole - whole)
    if each > 0:
        return each / np.maximum(norm * _get(row + 8 * NORM_FACTOR), each)
    return 1.0
