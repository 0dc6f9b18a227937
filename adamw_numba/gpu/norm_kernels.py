"""The norms of gradients on a GPU: sums of squares, their roots, and what follows from them, in two launches.

The first launch takes every gradient in fixed chunks. In the second, a block of threads for each array adds up its
chunks in order, and the last one to finish decides on the step and on what each gradient is multiplied with. Sums are
of float64, and the order of every addition is fixed, so equal gradients have equal norms.

The square of a large or small float64 does not fit a float64. So three sums are kept, of the squares of ordinary
numbers, of large ones made smaller and of small ones made larger by a power of two (Blue 1978, "A portable Fortran
program to find the Euclidean norm of a vector"). The square of any float32 does fit.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from ..update import TOTAL, G
from . import memory, parts
from .formula import accumulate
from .memory import ACCESS, FLOATS, SIZES, add_word, device_function, scalar_function
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
    NORMED,
    NORMS,
    NORMS_ALONE,
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

_get, _put = memory.number("float64")
_put_single = memory.number("float32")[1]
_row_at, _ = parts.coefficients_in("float64")  # decisions are made in float64 for all


class Sums(NamedTuple):
    """Sums of squares, of ordinary numbers, of large ones times `_RESCUE`, and of small ones over it."""

    middle: float
    big: float
    small: float


class Place(NamedTuple):
    """Where a run's gradient and its sum of the window lie, and bytes from one element of each to the next."""

    g: int
    total: int
    g_step: int
    step: int


@cache
def square_kernel(g_type: str, compute: str, accumulates: bool):
    """`square_function`, compiled for the current device."""
    return parts.kernel(square_function(g_type, compute, accumulates))


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
        row = row_at(group, max(parts.row_index(group, flags & STILL), 0), 0)
        c = coefficients(row, get(row))
        ends, chunks, chunk = entry(group, SQUARE_ENDS), entry(group, SQUARE_CHUNKS), np.int64(cuda.blockIdx.x)
        while chunk < chunks:
            run, begin, end = parts.elements_of(group, ends, chunk, SQUARES)
            sums = of_all_lanes(sums_of_chunk(group, table, run, begin, end, c), lanes)
            if cuda.threadIdx.x == 0:
                _put_sums(entry(group, PARTIALS) + _SUMS * chunk, sums)
            chunk += cuda.gridDim.x

    return square_kernel


def _sums_of_chunk(g_type, compute, accumulates):
    """The squares of a chunk that one thread of the block sums: the same ones in the same order, wherever they lie."""
    width = ACCESS // SIZES[g_type]
    add_whole, add_rest = _add_whole(g_type, compute, accumulates), _add_rest(g_type, compute, accumulates)
    is_aligned, total = _is_aligned(g_type, compute, accumulates), TOTAL if accumulates else G  # which is not read

    @device_function
    def sums_of_chunk(group, table, run, begin, end, c):
        column, arrays = table + 8 * entry(run, ARRAY), entry(group, ARRAYS)
        sums, i = Sums(0.0, 0.0, 0.0), begin + cuda.threadIdx.x * width
        if entry(column, arrays * G) == 0:
            return sums
        at = Place(
            entry(column, arrays * G) + entry(run, G_AT),
            entry(column, arrays * total) + entry(run, S_AT),
            entry(run, G_STEP),
            entry(run, S_STEP),
        )
        if is_aligned(at):
            sums, i = add_whole(sums, at, i, end, c)
        return add_rest(sums, at, i, end, c)

    return sums_of_chunk


@cache
def _is_aligned(g_type, compute, accumulates):
    """Whether every access of a run may be a wide one; its chunks begin at multiples of that."""
    g_size, size = SIZES[g_type], SIZES[compute]

    @scalar_function
    def is_aligned(at):
        is_dense, bits = at.g_step == g_size, at.g
        if accumulates:
            is_dense, bits = is_dense and at.step == size, bits | at.total
        return is_dense and bits & (ACCESS - 1) == 0

    return is_aligned


def _add_whole(g_type, compute, accumulates):
    """Add the squares of whole vectors, as long as there are several, all of which are loaded before the first is used.

    One load at a time for each thread would leave a quarter of an H100's bandwidth unused.
    """
    width, several = ACCESS // SIZES[g_type], 2 if accumulates else 4  # so many that all fit into the registers
    load, g_size, size = _load(g_type, compute, accumulates, width, several), SIZES[g_type], SIZES[compute]
    with_square, count, dtype = _with_square_of(compute), several * width, FLOATS[compute]

    @device_function
    def add_whole(sums, at, i, end, c):
        x = cuda.local.array(count, dtype)
        last = end - ((several - 1) * THREADS + 1) * width
        while i <= last:
            load(x, at.g + i * g_size, at.total + i * size, c)
            for k in range(count):
                sums = with_square(sums, np.float64(x[k]))
            i += several * THREADS * width
        return sums, i

    return add_whole


def _add_rest(g_type, compute, accumulates):
    """Add the squares of what is left of a chunk, or of all of it if it is not aligned, by single elements."""
    width, dtype = ACCESS // SIZES[g_type], FLOATS[compute]
    load, with_square = _load(g_type, compute, accumulates, 1), _with_square_of(compute)

    @device_function
    def add_rest(sums, at, i, end, c):
        x = cuda.local.array(1, dtype)
        while i < end:
            for k in range(i, min(i + width, end)):
                load(x, at.g + k * at.g_step, at.total + k * at.step, c)
                sums = with_square(sums, np.float64(x[0]))
            i += THREADS * width
        return sums

    return add_rest


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


def _with_square_of(compute):
    return _with_rescued_square if compute == "float64" else _with_square


def _load(g_type, compute, accumulates, width, several=1):
    """Load neighbours of a gradient, and of what the thread takes after them; with the sum of the window, if any."""
    apart = THREADS * width  # elements from what a thread takes to what it takes next
    load_g, _ = memory.elements(g_type, width, False, several, apart)
    load_total, _ = memory.elements(compute, width, True, several, apart)
    count, dtype = several * width, FLOATS[compute]

    @scalar_function
    def load(x, g, total, c):
        load_g(x, g)

    @device_function
    def load_sum(x, g, total, c):
        totals = cuda.local.array(count, dtype)
        load_g(x, g)
        load_total(totals, total)
        for k in range(count):
            x[k] = accumulate(totals[k], x[k], c)

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


def decision_function(group, flags, table):
    """The kernel, of one block for each array, that takes its norm; the last block to finish decides on the step."""
    lanes = cuda.shared.array(THREADS, types.float64)
    a = np.int64(cuda.blockIdx.x)
    norm = _root_of(_all_of_all_lanes(_sums_of_partials(group, a), lanes))
    if cuda.threadIdx.x == 0:
        _put(entry(group, NORMS) + 8 * a, norm)
    if flags & NORMS_ALONE == 0 and _is_last_block(entry(group, CONTROL), lanes):
        _decide(group, flags, lanes)


@device_function
def _sums_of_partials(group, a):
    """The sums of chunks of an array that one thread adds up."""
    own = entry(group, RANGES) + 24 * a
    sums, k, last = Sums(0.0, 0.0, 0.0), entry(own, 0) + cuda.threadIdx.x, entry(own, 1)
    while k < last:
        at = entry(group, PARTIALS) + _SUMS * k
        sums = Sums(sums.middle + _get(at), sums.big + _get(at + 8), sums.small + _get(at + 16))
        k += THREADS
    return sums


@device_function
def _is_last_block(control, lanes):
    """Whether all other blocks have written their norms, which this one then sees; every thread gets the answer."""
    if cuda.threadIdx.x == 0:
        cuda.threadfence()  # the norm is written before it is counted, and those of others are read after
        lanes[0] = add_word(control + 8 * NORMED, 1)
        cuda.threadfence()
    cuda.syncthreads()
    is_last = lanes[0] == cuda.gridDim.x - 1
    cuda.syncthreads()
    return is_last


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


@device_function
def _decide(group, flags, lanes):
    """Decide on the step, and on what each gradient is multiplied with; by one block, for the next launch."""
    index = max(parts.row_index(group, flags & STILL), 0)
    row, control = _row_at(group, index, 0), entry(group, CONTROL)
    whole = _whole_norm(entry(group, NORMS), entry(group, ARRAYS), lanes) * _get(row + 8 * NORM_FACTOR)
    if cuda.threadIdx.x == 0:
        put_entry(control, NORMED, 0)
        _put(control + 8 * NORM, whole)
        put_entry(control, GO, 1 if whole - whole == 0 else 0)  # not of an infinity, nor of NaN
    a = np.int64(cuda.threadIdx.x)
    while a < entry(group, ARRAYS):
        own = _row_at(group, index, entry(entry(group, RANGES) + 24 * a, 2))
        scale = _get(own + 8 * SCALE) * _clip_of(own, whole, _get(entry(group, NORMS) + 8 * a))
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
