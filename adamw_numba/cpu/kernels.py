"""The CPU target: `update` bound by Numba, over a table of addresses, in one compiled call per step.

A kernel is a C function ``void(block, part, parts)`` that does one of several equal shares of the work. `block` is the
address of a row of addresses and sizes (see `WORK` and what follows). So a call costs the same for one array as for a
thousand, and the code that runs kernels (jobs.py) is compiled once for all of them. Numba sees a 16-bit element as an
integer: ``int16`` stands for float16 and ``uint16`` for bfloat16.

Loops become vectors only if LLVM can see that no array of a step overlaps another. It looks for itself, once for each
call of a loop: it compares the ends of all arrays, and if any of them overlap, it takes the elements one by one.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, types

from ..arrays import runs as r
from ..arrays.compiled import c_function, first_above, jit, jit_for_python, pointer
from ..arrays.moments import BLOCK
from ..arrays.runs import ARRAY, COUNT, G_AT, G_STEP, P_AT, P_STEP, PLACE, PLACE_STEP, S_AT, S_STEP, START
from ..update import (
    AVERAGE,
    LEAST_EPSILON,
    MASTER,
    ROWS,
    TOP,
    TOTAL,
    Coefficients,
    G,
    M,
    P,
    Storage,
    V,
    Variant,
    accumulate,
    blend,
)
from . import masters as whole
from . import moments as small
from .formula import row_of, slot_of, update
from .intrinsics import FLUSHING, ask_for, exchange_mode, mode_for, widen
from .masters import put_value, value_of

WHOLE = 2**30  # elements: longer than any chunk
FURTHER_AHEAD = 4096  # bytes: a loop that only reads gets through them faster
LANES = 64  # independent sums of squares in a chunk: the same on every machine, whatever its vectors, for the same bits
LIKE = {"float32": np.float32(0), "float64": np.float64(0), "float16": np.int16(0), "bfloat16": np.uint16(0)}

# Entries of a block: addresses, then sizes. The last three say how elements are asked for (see prefetch.py): how many
# at a time, how many bytes ahead (0 where none are), and for the cache of which level.
WORK, CHUNKS, TABLE, ARRAYS, FACTORS, NUMBERS, PARTIALS, SUMS, IS_FAR, PIECE, AHEAD, LEVEL, BLOCK_WORDS = range(13)
# The numbers of a step, in a row for each group: the coefficients (see update.Coefficients), whether to overwrite the
# variables with their averages, the scale of the squares, and what the rounding of moments depends on: the seed and the
# number of the step. The last four are those of the first row.
SCALE, OVERWRITE, SQUARE_SCALE, SEED, NUMBER, HOW_MANY = 9, 12, 13, 14, 15, 16
# Rows of the factors, one number for each variable: which row of the numbers holds for it, its clip, its name (as a
# number).
WHICH, CLIP, NAME, FACTOR_ROWS = range(4)


def on(flag):
    """A flag as compiled code takes it: None, which Numba compiles away, or True.

    Each flag has to be an argument of its own. Numba forgets that the entries of a tuple are constant: it would keep
    both branches of ``x is None``, and the loops would not become vectors.
    """
    return True if flag else None


c_kernel = c_function(types.void(types.intp, types.intp, types.intp))
_accumulate = jit(accumulate)
_blend = jit(blend)


@jit
def _at(x, i):
    return None if x is None else x[i]


@jit
def _put(x, i, value):
    if x is not None:
        x[i] = value


@jit
def update_chunk(count, p, g, m, v, top, average, total, master, limit, lead, c, small_ones=None):
    """Update the elements of one dense or strided run: arrays, or pointers."""
    place = small.first_place(small_ones)
    for i in range(count):
        value, mi, vi, highest, mean = update(
            value_of(p, master, i),
            widen(g[i]),
            small.momentum(m, i, small_ones),
            small.velocity(v, i, small_ones),
            _at(top, i),
            _at(average, i),
            _at(total, i),
            limit,
            lead,
            c,
        )
        put_value(p, master, i, value)
        place = small.put(m, v, i, mi, vi, place, small_ones)
        _put(top, i, highest)
        _put(average, i, mean)
    if total is not None:
        for i in range(count):
            total[i] = 0


@jit
def _blend_chunk(p, average, master, c):
    if average is not None:
        for i in range(p.size):
            average[i] = _blend(average[i], value_of(p, master, i), c)


@jit
def overwrite_chunk(count, p, average, master):
    """Put the averages into the variables."""
    if average is not None:
        for i in range(count):
            put_value(p, master, i, average[i])


@jit
def _share(block, part, parts):
    """The work list, and the chunks that are one part's: about as many elements as any other part has.

    Where parts begin has no effect on the result: an element's update needs no other element, and a norm is summed up
    chunk by chunk.
    """
    chunks = block[CHUNKS]
    work = carray(pointer(block[WORK], np.int64(0)), (chunks, r.COLUMNS))
    if parts == 1:
        return work, 0, chunks
    total = work[chunks - 1, START] + work[chunks - 1, COUNT]
    starts = work[:, START]
    first, last = total * part // parts, total * (part + 1) // parts
    return work, first_above(starts, first - 1), first_above(starts, last - 1)


@jit
def _numbers(block):
    return carray(pointer(block[NUMBERS], 0.0), HOW_MANY)


@jit
def coefficients_of(block, a, like):
    factors = carray(pointer(block[FACTORS], 0.0), (FACTOR_ROWS, block[ARRAYS]))
    row = carray(pointer(block[NUMBERS] + 8 * HOW_MANY * np.int64(factors[WHICH, a]), 0.0), HOW_MANY)
    return cast_coefficients(row, factors[CLIP, a], like)


@jit
def cast_coefficients(c, clip, like):
    """A row of coefficients for one array, in the dtype of the arithmetic."""
    cast = type(like)
    return Coefficients(
        cast(c[0]),
        cast(c[1]),
        max(cast(c[2]), cast(LEAST_EPSILON)),
        cast(c[3]),
        cast(c[4]),
        cast(c[5]),
        cast(c[6]),
        cast(c[7]),
        cast(c[8]),
        cast(c[9] * clip),
        cast(c[10]),
        cast(c[11]),
    )


@jit
def _mode(block):
    """The floating-point mode of a step: the one that suits the smallest factor of any variable's gradient."""
    factors, least = carray(pointer(block[FACTORS], 0.0), (FACTOR_ROWS, block[ARRAYS])), 1.0
    for a in range(block[ARRAYS]):
        least = min(least, factors[CLIP, a])
    return mode_for(abs(_numbers(block)[SCALE]) * least)


@jit
def table_of(block):
    return carray(pointer(block[TABLE], np.int64(0)), (ROWS, block[ARRAYS]))


@jit
def _keys(block, a, halvings):
    """What the noise of one variable at this step depends on, besides the elements."""
    if halvings == 0:
        return np.uint32(0), np.uint32(0)
    numbers, factors = _numbers(block), carray(pointer(block[FACTORS], 0.0), (FACTOR_ROWS, block[ARRAYS]))
    seed, name, number = np.int64(numbers[SEED]), np.int64(factors[NAME, a]), np.int64(numbers[NUMBER])
    return small.keys(np.uint32(seed), np.uint32(name), np.uint32(number))


@jit
def _update_share(
    address, part, parts, p_like, g_like, like, m_like, strided, master, amsgrad, average, accumulate, clip, nesterov
):
    block = carray(pointer(address, np.int64(0)), BLOCK_WORDS)
    work, first, last = _share(block, part, parts)
    table = table_of(block)
    overwrite = _numbers(block)[OVERWRITE] != 0
    far, level = block[AHEAD], block[LEVEL]
    halvings, rest, kept = small.halvings(like, m_like), small.halvings(like, master), small.kept_scales()
    piece = min(block[PIECE], BLOCK) if halvings == 2 else block[PIECE]  # of 8 bits, within a block
    further = small.SPAN if halvings == 2 else 0  # elements: their scales are looked for first
    for w in range(first, last):
        a, step = work[w, ARRAY], work[w, S_STEP]
        c = coefficients_of(block, a, like)
        keys = _keys(block, a, halvings)
        for start in range(0, work[w, COUNT], piece):
            n, at = min(piece, work[w, COUNT] - start), work[w, S_AT] + start * step
            p_at = table[P, a] + work[w, P_AT] + start * work[w, P_STEP]
            g_at = table[G, a] + work[w, G_AT] + start * work[w, G_STEP]
            p = row_of(p_at, n, work[w, P_STEP], p_like, strided)
            averages = slot_of(average, table[AVERAGE, a] + at, n, step, like, strided)
            masters = slot_of(master, table[MASTER, a] + (at >> rest), n, step >> rest, master, strided)
            if table[G, a] != 0:
                if far and strided is None:
                    ask_for(True, p_at, n, work[w, P_STEP], far, level)
                    narrow_step, ahead = step >> halvings, (far + further * step) >> halvings
                    ask_for(True, g_at, n, work[w, G_STEP], far + further * work[w, G_STEP], level)
                    ask_for(True, table[M, a] + (at >> halvings), n, narrow_step, ahead, level)
                    ask_for(True, table[V, a] + (at >> halvings), n, narrow_step, ahead, level)
                    ask_for(amsgrad, table[TOP, a] + at, n, step, far, level)
                    ask_for(average, table[AVERAGE, a] + at, n, step, far, level)
                    ask_for(accumulate, table[TOTAL, a] + at, n, step, far, level)
                    ask_for(master, table[MASTER, a] + (at >> rest), n, step >> rest, far >> rest, level)
                m = row_of(table[M, a] + (at >> halvings), n, step >> halvings, m_like, strided)
                v = row_of(table[V, a] + (at >> halvings), n, step >> halvings, m_like, strided)
                g = row_of(g_at, n, work[w, G_STEP], g_like, strided)
                total = slot_of(accumulate, table[TOTAL, a] + at, n, step, like, strided)
                limit = None if clip is None else c.limit
                places = work[w, PLACE] + start * work[w, PLACE_STEP], work[w, PLACE_STEP]
                if start % small.SPAN == 0:
                    small.prepare(m, kept, work[w], start, table, g_like, like, strided, accumulate, limit, c)
                small_ones = small.described(m, kept, start, places, keys)
                update_chunk(
                    n,
                    p,
                    g,
                    m,
                    v,
                    slot_of(amsgrad, table[TOP, a] + at, n, step, like, strided),
                    averages,
                    total,
                    masters,
                    limit,
                    None if nesterov is None else c.lead,
                    c,
                    small_ones,
                )
            else:
                _blend_chunk(p, averages, masters, c)
            if overwrite:
                overwrite_chunk(n, p, averages, masters)


@jit
def _accumulate_share(address, part, parts, g_like, like, strided):
    block = carray(pointer(address, np.int64(0)), BLOCK_WORDS)
    work, first, last = _share(block, part, parts)
    table = table_of(block)
    for w in range(first, last):
        a, n = work[w, ARRAY], work[w, COUNT]
        if table[G, a] != 0:
            c = coefficients_of(block, a, like)
            g = row_of(table[G, a] + work[w, G_AT], n, work[w, G_STEP], g_like, strided)
            total = row_of(table[TOTAL, a] + work[w, S_AT], n, work[w, S_STEP], like, strided)
            for i in range(n):
                total[i] = _accumulate(total[i], widen(g[i]), c)


@jit
def gradient(g, total, i, c):
    """An element of a gradient, with what has been accumulated."""
    return widen(g[i]) if total is None else _accumulate(total[i], widen(g[i]), c)


@jit
def _square(g, total, i, c, scale):
    x = np.float64(gradient(g, total, i, c))
    return x * x if scale is None else x * scale * (x * scale)


@jit
def sum_squares(g, total, c, scale, sums, far):
    """The sum of squares of a chunk: element i goes to lane i mod LANES, then the lanes are added in a fixed tree."""
    sums[:] = 0
    rows = 4 * LANES
    fours = g.size - g.size % rows
    for start in range(0, fours, rows):
        if far:
            ask_for(True, g.ctypes.data + start * g.itemsize, rows, g.itemsize, FURTHER_AHEAD, 1)
            if total is not None:
                ask_for(True, total.ctypes.data + start * total.itemsize, rows, total.itemsize, FURTHER_AHEAD, 1)
        for lane in range(LANES):  # four rows at once, so that each sum is loaded and stored once for all of them
            i = start + lane
            value = sums[lane] + _square(g, total, i, c, scale)
            value += _square(g, total, i + LANES, c, scale)
            value += _square(g, total, i + 2 * LANES, c, scale)
            sums[lane] = value + _square(g, total, i + 3 * LANES, c, scale)
    for start in range(fours, g.size, LANES):
        for lane in range(min(LANES, g.size - start)):
            sums[lane] += _square(g, total, start + lane, c, scale)
    width = LANES
    while width > 1:
        width //= 2
        for lane in range(width):
            sums[lane] += sums[width + lane]
    return sums[0]


@jit
def _square_share(address, part, parts, g_like, like, strided, accumulate, scaled):
    block = carray(pointer(address, np.int64(0)), BLOCK_WORDS)
    work, first, last = _share(block, part, parts)
    table = table_of(block)
    partials = carray(pointer(block[PARTIALS], 0.0), block[CHUNKS])
    sums = carray(pointer(block[SUMS] + part * 8 * LANES, 0.0), LANES)
    scale = None if scaled is None else _numbers(block)[SQUARE_SCALE]
    far = block[IS_FAR] != 0
    for w in range(first, last):
        a, n = work[w, ARRAY], work[w, COUNT]
        partials[w] = 0
        if table[G, a] != 0:
            c = coefficients_of(block, a, like)
            g = row_of(table[G, a] + work[w, G_AT], n, work[w, G_STEP], g_like, strided)
            totals = slot_of(accumulate, table[TOTAL, a] + work[w, S_AT], n, work[w, S_STEP], like, strided)
            partials[w] = sum_squares(g, totals, c, scale, sums, far)


@cache
def update_kernel(storage: Storage, variant: Variant) -> Any:
    """The kernel that updates variables, and moves the averages of those that have no gradient."""
    p_like, g_like, like = LIKE[storage.p], LIKE[storage.g], LIKE[storage.compute]
    strided, master, amsgrad = on(storage.strided), whole.LIKE[storage.master], on(storage.amsgrad)
    average, accumulate, clip, nesterov = map(on, variant)
    m_like = small.LIKE.get(storage.moments, like)

    @c_kernel
    def update_kernel(block, part, parts):
        mode = exchange_mode(_mode(carray(pointer(block, np.int64(0)), BLOCK_WORDS)))
        _update_share(
            block,
            part,
            parts,
            p_like,
            g_like,
            like,
            m_like,
            strided,
            master,
            amsgrad,
            average,
            accumulate,
            clip,
            nesterov,
        )
        exchange_mode(mode)

    return update_kernel


def accumulate_kernel(storage: Storage) -> Any:
    """The kernel that adds gradients to their accumulators, between updates."""
    return _accumulate_kernel(_of_gradients(storage))


def square_kernel(storage: Storage, accumulate: bool) -> Any:
    """The kernel that writes each chunk's sum of squared gradients, or of gradients plus what has been accumulated."""
    return _square_kernel(_of_gradients(storage), bool(accumulate))


def _of_gradients(storage):
    """A storage as kernels see it that do not touch the variables: one of them serves variables of any kind."""
    return storage._replace(p=storage.g, master="", amsgrad=False, moments="float32")


@cache
def _accumulate_kernel(storage):
    g_like, like, strided = LIKE[storage.g], LIKE[storage.compute], on(storage.strided)

    @c_kernel
    def accumulate_kernel(block, part, parts):
        mode = exchange_mode(FLUSHING)
        _accumulate_share(block, part, parts, g_like, like, strided)
        exchange_mode(mode)

    return accumulate_kernel


@cache
def _square_kernel(storage, accumulate):
    g_like, like, strided = LIKE[storage.g], LIKE[storage.compute], on(storage.strided)
    accumulate = on(accumulate)
    scaled = on(storage.compute == "float64")  # the square of a float32 is never out of a float64's range

    @c_kernel
    def square_kernel(block, part, parts):
        _square_share(block, part, parts, g_like, like, strided, accumulate=accumulate, scaled=scaled)

    return square_kernel


@jit_for_python
def gather_squares(work, partials, squares):
    """Add up the chunks of each variable, in order."""
    for w in range(work.shape[0]):
        squares[work[w, ARRAY]] += partials[w]


@jit_for_python
def add_in_order(values):
    """A sum from the first to the last, whose rounding does not depend on the machine; NumPy's own does."""
    total = 0.0
    for value in values:
        total += value
    return total
