"""The CPU target: `update` bound by Numba, over a table of addresses, in one compiled call per step.

A kernel is a C function ``void(task, part, parts)`` that does one of several equal shares of the work; what it is told
lies in memory (see blocks.py). So a call costs the same for one array as for a thousand, and the code that runs kernels
(jobs.py) is compiled once for all of them. The kernel of updates is the walk (walk.py), which calls the loops that are
compiled here, a C function ``void(record)`` each. Numba sees a 16-bit element as an integer: ``int16`` stands for
float16 and ``uint16`` for bfloat16.

Loops become vectors only if LLVM can see that no array of a step overlaps another. It looks for itself, once for each
call of a loop: it compares the ends of all arrays, and if any of them overlap, it takes the elements one by one.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..arrays.compiled import inlined, jit, jit_for_python, numbers_at, pointer, words_at
from ..arrays.runs import ARRAY, COUNT, G_AT, G_STEP, S_AT, S_STEP
from ..update import (
    AVERAGE,
    M_SCALE,
    MASTER,
    TOP,
    TOTAL,
    V_SCALE,
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
from . import blocks as b
from . import masters
from . import moments as small
from .formula import operand, row_of, slot_of, update
from .intrinsics import FLUSHING, ask_for, call_loop, exchange_mode, widen
from .masters import put_value, value_of
from .walk import ask_loop, walk_kernel

FURTHER_AHEAD = 4096  # bytes: a loop that only reads gets through them faster
LANES = 64  # independent sums of squares in a chunk: the same on every machine, whatever its vectors, for the same bits
LIKE = {"float32": np.float32(0), "float64": np.float64(0), "float16": np.int16(0), "bfloat16": np.uint16(0)}


def on(flag):
    """A flag as compiled code takes it: None, which Numba compiles away, or True.

    Each flag has to be an argument of its own. Numba forgets that the entries of a tuple are constant: it would keep
    both branches of ``x is None``, and the loops would not become vectors.
    """
    return True if flag else None


_accumulate = jit(accumulate)
_blend = jit(blend)


@jit
def _at(x, i):
    return None if x is None else x[i]


@jit
def _put(x, i, value):
    if x is not None:
        x[i] = value


@inlined
def update_chunk(count, p, g, m, v, top, average, total, master, limit, lead, c, small_ones=None):
    """Update the elements of one dense or strided run: arrays, or pointers."""
    for i in range(count):
        value, mi, vi, highest, mean = update(
            value_of(p, master, i),
            widen(g[i]),
            small.momentum(m, i),
            small.velocity(v, i),
            _at(top, i),
            _at(average, i),
            _at(total, i),
            limit,
            lead,
            c,
        )
        put_value(p, master, i, value)
        small.put(m, v, i, mi, vi, small_ones)
        _put(top, i, highest)
        _put(average, i, mean)
    if total is not None:
        for i in range(count):
            total[i] = 0


@jit
def _blend_chunk(count, p, average, master, c):
    for i in range(count):
        average[i] = _blend(average[i], value_of(p, master, i), c)


@jit
def overwrite_chunk(count, p, average, master):
    """Put the averages into the variables."""
    if average is not None:
        for i in range(count):
            put_value(p, master, i, average[i])


@jit
def _coefficients_in(at, like):
    """The coefficients in the record at an address."""
    c = pointer(at + 8 * b.entry_of_coefficients(like), like)
    return Coefficients(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])


@jit
def _update_piece(at, p_like, g_like, like, m_like, strided, master, amsgrad, average, accumulate, clip, nesterov):
    record, c = words_at(at), _coefficients_in(at, like)
    update_chunk(
        record[b.LENGTH],
        operand(True, record, P, p_like, strided),
        operand(True, record, G, g_like, strided),
        operand(True, record, M, m_like, strided),
        operand(True, record, V, m_like, strided),
        operand(amsgrad, record, TOP, like, strided),
        operand(average, record, AVERAGE, like, strided),
        operand(accumulate, record, TOTAL, like, strided),
        operand(master, record, MASTER, master, strided),
        None if clip is None else c.limit,
        None if nesterov is None else c.lead,
        c,
    )


@jit
def _update_blocks(at, p_like, g_like, like, m_like, strided, master, amsgrad, average, accumulate, clip, nesterov):
    """The same with moments of fewer bits: block by block."""
    record, c = words_at(at), _coefficients_in(at, like)
    limit, lead = None if clip is None else c.limit, None if nesterov is None else c.lead
    small.find_key(record)
    for start in range(0, record[b.LENGTH], b.SPAN):
        end = min(start + b.SPAN, record[b.LENGTH])
        small.find_scales(at, start, end - start, m_like, g_like, like, strided, accumulate, limit, c)
        for first in range(start, end, record[b.CUT]):
            if record[b.ASKS] != 0:
                record[b.NEXT] = first
                call_loop(record[b.ASKS], at)
            update_chunk(
                min(record[b.CUT], end - first),
                operand(True, record, P, p_like, strided, first),
                operand(True, record, G, g_like, strided, first),
                operand(True, record, M, m_like, strided, first),
                operand(True, record, V, m_like, strided, first),
                operand(amsgrad, record, TOP, like, strided, first),
                operand(average, record, AVERAGE, like, strided, first),
                operand(accumulate, record, TOTAL, like, strided, first),
                operand(master, record, MASTER, master, strided, first),
                limit,
                lead,
                small.betas_scaled(at, first, m_like, c),
                (*small.noise_from(record, first, strided), *small.new_scales(at, first, m_like)),
            )


@jit
def _average_piece(at, p_like, like, strided, master):
    record, c = words_at(at), _coefficients_in(at, like)
    p, average = operand(True, record, P, p_like, strided), operand(True, record, AVERAGE, like, strided)
    whole = operand(master, record, MASTER, master, strided)
    if record[G] == 0:
        _blend_chunk(record[b.LENGTH], p, average, whole, c)
    if record[b.OVERWRITES] != 0:
        overwrite_chunk(record[b.LENGTH], p, average, whole)


@jit
def _accumulate_share(task, part, parts, g_like, like, strided):
    block = b.block_of(task)
    first, last = b.share(block, part, parts)
    for w in range(first, last):
        work = b.row_of_work(block, w)
        a, n = work[ARRAY], work[COUNT]
        if b.address_in(block, G, a) != 0:
            c = b.coefficients_of(block, a, like)
            g = row_of(b.address_in(block, G, a) + work[G_AT], n, work[G_STEP], g_like, strided)
            total = row_of(b.address_in(block, TOTAL, a) + work[S_AT], n, work[S_STEP], like, strided)
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
def sum_squares(count, g, total, c, scale, sums, asked=0, step=0):
    """The sum of squares of a chunk: element i goes to lane i mod LANES, then the lanes are added in a fixed tree.

    Parameters
    ----------
    g, total : array or pointer
        The second may be None.
    sums : pointer or array
        Room for `LANES` numbers.
    asked, step : int
        Where elements of the gradient are to be asked for, unless 0, and the bytes from one to the next.
    """
    for lane in range(LANES):
        sums[lane] = 0
    rows = 4 * LANES
    fours = count - count % rows
    for start in range(0, fours, rows):
        if asked != 0:
            ask_for(asked + start * step, rows * step, 1)
        for lane in range(LANES):  # four rows at once, so that each sum is loaded and stored once for all of them
            i = start + lane
            value = sums[lane] + _square(g, total, i, c, scale)
            value += _square(g, total, i + LANES, c, scale)
            value += _square(g, total, i + 2 * LANES, c, scale)
            sums[lane] = value + _square(g, total, i + 3 * LANES, c, scale)
    for start in range(fours, count, LANES):
        for lane in range(min(LANES, count - start)):
            sums[lane] += _square(g, total, start + lane, c, scale)
    width = LANES
    while width > 1:
        width //= 2
        for lane in range(width):
            sums[lane] += sums[width + lane]
    return sums[0]


@jit
def _square_share(task, part, parts, g_like, like, strided, accumulate, scaled):
    block = b.block_of(task)
    first, last = b.share(block, part, parts)
    partials, far = numbers_at(block[b.PARTIALS]), block[b.IS_FAR] != 0
    sums = numbers_at(block[b.SUMS] + part * 8 * LANES)
    scale = None if scaled is None else numbers_at(block[b.NUMBERS])[b.SQUARE_SCALE]
    for w in range(first, last):
        work = b.row_of_work(block, w)
        a, n = work[ARRAY], work[COUNT]
        partials[w] = 0
        if b.address_in(block, G, a) != 0:
            c = None if accumulate is None else b.coefficients_of(block, a, like)
            g = row_of(b.address_in(block, G, a) + work[G_AT], n, work[G_STEP], g_like, strided)
            total = slot_of(accumulate, b.address_in(block, TOTAL, a) + work[S_AT], n, work[S_STEP], like, strided)
            asked = b.address_in(block, G, a) + work[G_AT] + FURTHER_AHEAD if far else 0
            partials[w] = sum_squares(n, g, total, c, scale, sums, asked, work[G_STEP])


class Kernel(NamedTuple):
    """The address of a kernel, and what else its task holds (see blocks.py)."""

    address: int
    others: tuple[int, ...] = ()


def update_kernel(storage: Storage, variant: Variant) -> Kernel:
    """What updates variables, and moves the averages of those that have no gradient."""
    slots = {TOP: storage.amsgrad, AVERAGE: variant.average, TOTAL: variant.accumulate, MASTER: storage.master}
    further = [row for row, exists in slots.items() if exists]
    further += [M_SCALE, V_SCALE] if storage.moments == "8bit" else []
    averages = average_loop(_of_averages(storage)).address if variant.average else 0
    asks = ask_loop().address if storage.moments in small.LIKE else 0
    loops = update_loop(storage, variant).address, asks, averages
    return Kernel(walk_kernel().address, (*loops, len(further), *further))


@cache
def update_loop(storage: Storage, variant: Variant) -> Any:
    """The loop that updates a piece of a variable."""
    p_like, g_like, like = LIKE[storage.p], LIKE[storage.g], LIKE[storage.compute]
    strided, master, amsgrad = on(storage.strided), masters.LIKE[storage.master], on(storage.amsgrad)
    average, accumulate, clip, nesterov = map(on, variant)
    m_like = small.LIKE.get(storage.moments, like)
    update_all = _update_blocks if storage.moments in small.LIKE else _update_piece

    @b.c_loop
    def update_loop(at):
        update_all(at, p_like, g_like, like, m_like, strided, master, amsgrad, average, accumulate, clip, nesterov)

    return update_loop


@cache
def average_loop(storage: Storage) -> Any:
    """The loop that moves averages which have no update to move with, and puts averages into variables."""
    p_like, like = LIKE[storage.p], LIKE[storage.compute]
    strided, master = on(storage.strided), masters.LIKE[storage.master]

    @b.c_loop
    def average_loop(at):
        _average_piece(at, p_like, like, strided, master)

    return average_loop


def accumulate_kernel(storage: Storage) -> Kernel:
    """The kernel that adds gradients to their accumulators, between updates."""
    return Kernel(_accumulate_kernel(_of_gradients(storage)).address)


def square_kernel(storage: Storage, accumulate: bool) -> Kernel:
    """The kernel that writes each chunk's sum of squared gradients, or of gradients plus what has been accumulated."""
    return Kernel(_square_kernel(_of_gradients(storage), bool(accumulate)).address)


def _of_averages(storage):
    """A storage as a loop sees it that touches neither gradients nor moments."""
    return storage._replace(g=storage.p, amsgrad=False, moments="float32")


def _of_gradients(storage):
    """A storage as kernels see it that do not touch the variables: one of them serves variables of any kind."""
    return storage._replace(p=storage.g, master="", amsgrad=False, moments="float32")


@cache
def _accumulate_kernel(storage):
    g_like, like, strided = LIKE[storage.g], LIKE[storage.compute], on(storage.strided)

    @b.c_kernel
    def accumulate_kernel(task, part, parts):
        mode = exchange_mode(FLUSHING)
        _accumulate_share(task, part, parts, g_like, like, strided)
        exchange_mode(mode)

    return accumulate_kernel


@cache
def _square_kernel(storage, accumulate):
    g_like, like, strided = LIKE[storage.g], LIKE[storage.compute], on(storage.strided)
    accumulate = on(accumulate)
    scaled = on(storage.compute == "float64")  # the square of a float32 is never out of a float64's range

    @b.c_kernel
    def square_kernel(task, part, parts):
        _square_share(task, part, parts, g_like, like, strided, accumulate=accumulate, scaled=scaled)

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
