"""The CUDA target: `update` bound by `numba.cuda`, over a table of addresses, in one launch for any number of arrays.

A kernel takes three integers: the address of a block of words on the device, flags, and which step it belongs to. All
that changes from step to step (coefficients, decisions, the step counter) is read from the device's memory, so that a
captured graph follows a schedule. Every group of arrays (those stored alike) counts the steps it has done: a launch
does nothing unless it is its group's turn, which is how a launch can be repeated after an interruption, and how a
skipped step is one whose counter did not move.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, types

from ..update import (
    AVERAGE,
    MASTER,
    TOP,
    TOTAL,
    Coefficients,
    G,
    M,
    P,
    V,
    accumulate,
    blend,
    make_update,
)
from . import memory
from .memory import ACCESS, SIZES, add_word, device_function, put_word, word

BLOCK = 2 if memory.SIMULATED else 256  # threads; also the number of lanes of a norm
SQUARES = 16 * BLOCK if memory.SIMULATED else 16_384  # elements of one partial sum of squares

# The block of a group: addresses on the device, and numbers.
TABLE, ARRAYS, RUNS, RUN_COUNT, ENDS, CHUNKS, CHUNK, CONTROL, HEADER, ROWS, ROWS_DOUBLE, SCALES = range(12)
SCALES_DOUBLE, GROUP, GROUPS, SQUARE_ENDS, SQUARE_CHUNKS, PARTIALS, RANGES, NORMS, BLOCK_WORDS = range(12, 21)
# Columns of the runs: positions and steps in bytes.
ARRAY, COUNT, DECAYED, P_AT, G_AT, S_AT, P_STEP, G_STEP, S_STEP, RUN_COLUMNS = range(10)
# The control words: the verdict, what the host asks about, blocks that have finished, the counters of the groups.
GO, EXHAUSTED, SKIPPED, NORM, TICKET, COUNTERS = range(6)
# The header of the rows: the iteration that the first one is for, and how many there are.
FIRST, ROW_COUNT = range(2)
# The columns of a row: ten coefficients, then
OVERWRITE, IS_UPDATE, NORM_FACTOR, CLIPNORM, GLOBAL_CLIPNORM, ROW_COLUMNS = range(10, 16)
# Flags of a launch: scales come from the norms; a verdict is asked for; use row 0 and count nothing.
CLIPPED, GUARDED, STILL = 1, 2, 4

SIGNATURE = types.void(types.int64, types.int64, types.int64)
_BIG, _SMALL, _RESCUE = 2.0**480, 2.0**-480, 2.0**-600  # where squares of float64 would over- or underflow
_UPDATE, _ACCUMULATE, _BLEND = range(3)

_update = device_function(make_update(math.sqrt, np.maximum, np.minimum))
_accumulate = device_function(accumulate)
_blend = device_function(blend)


@device_function
def _row_index(block, flags, expected):
    """Which row of coefficients a group is to use now; negative if it is not its turn or there is no such row."""
    if flags & STILL:
        return 0
    control, group = word(block + 8 * CONTROL), word(block + 8 * GROUP)
    counters = control + 8 * COUNTERS
    counter = word(counters + 8 * group)
    if group == 0:
        in_turn = word(counters + 8 * (word(block + 8 * GROUPS) - 1)) == counter
    else:
        in_turn = word(counters + 8 * (group - 1)) == counter + 1
    if not in_turn or (expected >= 0 and counter != expected):
        return -1
    header = word(block + 8 * HEADER)
    index = counter - word(header + 8 * FIRST)
    if index < 0 or index >= word(header + 8 * ROW_COUNT):
        return -2
    if group == 0 and flags & GUARDED and word(control + 8 * GO) == 0:
        return -3
    return index


@device_function
def _finish(block, flags, index):
    """The last block of a launch moves its group's counter, or notes why not."""
    control, group = word(block + 8 * CONTROL), word(block + 8 * GROUP)
    if add_word(control + 8 * TICKET, 1) != cuda.gridDim.x - 1:
        return
    put_word(control + 8 * TICKET, 0)
    if index == -2:
        put_word(control + 8 * EXHAUSTED, 1)
    elif index == -3:
        put_word(control + 8 * SKIPPED, word(control + 8 * SKIPPED) + 1)
    elif index >= 0 and not flags & STILL:
        counter = control + 8 * COUNTERS + 8 * group
        put_word(counter, word(counter) + 1)


@device_function
def _find(ends, count, chunk):
    """The first run that ends after a chunk."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if word(ends + 8 * middle) > chunk:
            high = middle
        else:
            low = middle + 1
    return low


@device_function
def _begin(ends, run, chunk, size):
    """Where in its run a chunk begins."""
    before = word(ends + 8 * (run - 1)) if run > 0 else 0
    return (chunk - before) * size


def _coefficients_of(compute):
    get, size = memory.number(compute)[0], SIZES[compute]

    @device_function
    def coefficients(row, decayed, scale):
        zero = get(row) - get(row)
        return Coefficients(
            get(row),
            get(row + size) if decayed else zero,
            get(row + 2 * size),
            get(row + 3 * size),
            get(row + 4 * size),
            get(row + 5 * size),
            get(row + 6 * size),
            scale,
            get(row + 8 * size),
            get(row + 9 * size),
        )

    return coefficients


def _lanes(p_type, g_type, compute, top, average, total, master, width):
    """What a thread does with `width` neighbours, given the address of the first in each array."""
    dtype = {"float32": types.float32, "float64": types.float64}[compute]
    load_p, store_p = memory.elements(p_type, width, False)
    load_g, _ = memory.elements(g_type, width, False)
    load, store = memory.elements(compute, width, True)
    rounded = memory.rounded(p_type) if master else None

    @device_function
    def read_variable(p, master_at, p_at):
        load_p(p, p_at)
        if master is not None:
            kept = cuda.local.array(width, dtype)
            load(kept, master_at)
            for k in range(width):
                if rounded(kept[k]) == p[k]:
                    p[k] = kept[k]

    @device_function
    def write_variable(p, master_at, p_at):
        store_p(p, p_at)
        if master is not None:
            store(p, master_at)

    @device_function
    def update_lanes(p_at, g_at, m_at, v_at, top_at, average_at, total_at, master_at, overwrite, c):
        p, g = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        m, v = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        tops, averages, totals = (
            cuda.local.array(width, dtype),
            cuda.local.array(width, dtype),
            cuda.local.array(width, dtype),
        )
        read_variable(p, master_at, p_at)
        load_g(g, g_at)
        load(m, m_at)
        load(v, v_at)
        if top is not None:
            load(tops, top_at)
        if average is not None:
            load(averages, average_at)
        if total is not None:
            load(totals, total_at)
        for k in range(width):
            p[k], m[k], v[k], highest, mean = _update(
                p[k],
                g[k],
                m[k],
                v[k],
                tops[k] if top is not None else None,
                averages[k] if average is not None else None,
                totals[k] if total is not None else None,
                c.limit,
                c,
            )
            if top is not None:
                tops[k] = highest
            if average is not None:
                averages[k] = mean
                p[k] = mean if overwrite else p[k]
            if total is not None:
                totals[k] = 0
        write_variable(p, master_at, p_at)
        store(m, m_at)
        store(v, v_at)
        if top is not None:
            store(tops, top_at)
        if average is not None:
            store(averages, average_at)
        if total is not None:
            store(totals, total_at)

    @device_function
    def accumulate_lanes(g_at, total_at, c):
        if total is not None:
            g, totals = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
            load_g(g, g_at)
            load(totals, total_at)
            for k in range(width):
                totals[k] = _accumulate(totals[k], g[k], c)
            store(totals, total_at)

    @device_function
    def blend_lanes(p_at, average_at, master_at, overwrite, c):
        if average is not None:
            p, averages = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
            read_variable(p, master_at, p_at)
            load(averages, average_at)
            for k in range(width):
                averages[k] = _blend(averages[k], p[k], c)
            store(averages, average_at)
            if overwrite:
                write_variable(averages, master_at, p_at)

    return update_lanes, accumulate_lanes, blend_lanes


def update_function(p_type, g_type, compute, top, average, total, master):
    """The kernel that updates variables stored as `p_type`, or accumulates; each option is None or True."""
    p_size, g_size, size = SIZES[p_type], SIZES[g_type], SIZES[compute]
    width = ACCESS // min(p_size, g_size)
    update_many, accumulate_many, blend_many = _lanes(p_type, g_type, compute, top, average, total, master, width)
    update_one, accumulate_one, blend_one = _lanes(p_type, g_type, compute, top, average, total, master, 1)
    coefficients, get = _coefficients_of(compute), memory.number(compute)[0]
    rows_at, scales_at = (ROWS, SCALES) if compute == "float32" else (ROWS_DOUBLE, SCALES_DOUBLE)
    slots = [(TOP, top), (AVERAGE, average), (TOTAL, total), (MASTER, master)]
    top_row, average_row, total_row, master_row = (row if wanted else M for row, wanted in slots)

    @device_function
    def misaligned(address, elements, element_size):
        return (address + elements * element_size) % ACCESS != 0

    @device_function
    def head_of(p, g, m, v, tops, averages, totals, masters, mode, count):
        """How many elements come before the first that is aligned in every array; all, if there is none."""
        head = (-p % ACCESS) // p_size % width
        odd = misaligned(p, head, p_size)
        if mode != _BLEND:
            odd |= misaligned(g, head, g_size)
        odd |= misaligned(m, head, size) or misaligned(v, head, size)
        odd |= misaligned(tops, head, size) or misaligned(averages, head, size)
        odd |= misaligned(totals, head, size) or misaligned(masters, head, size)
        return count if odd or head > count else head

    @device_function
    def chunk_update(block, row, scale, run, begin, end):
        arrays, table = word(block + 8 * ARRAYS), word(block + 8 * TABLE)
        a = word(run + 8 * ARRAY)
        column = table + 8 * a
        g_base = word(column + 8 * arrays * G)
        updating, overwrite = get(row + IS_UPDATE * size) != 0, get(row + OVERWRITE * size) != 0
        mode = _UPDATE if updating else _ACCUMULATE
        if g_base == 0:
            if average is None or not updating:
                return
            mode = _BLEND
        c = coefficients(row, word(run + 8 * DECAYED) != 0, scale)
        p_step, g_step, step = word(run + 8 * P_STEP), word(run + 8 * G_STEP), word(run + 8 * S_STEP)
        at = word(run + 8 * S_AT) + begin * step
        p = word(column + 8 * arrays * P) + word(run + 8 * P_AT) + begin * p_step
        g = g_base + word(run + 8 * G_AT) + begin * g_step
        m = word(column + 8 * arrays * M) + at
        v = word(column + 8 * arrays * V) + at
        tops = word(column + 8 * arrays * top_row) + at
        averages = word(column + 8 * arrays * average_row) + at
        totals = word(column + 8 * arrays * total_row) + at
        masters = word(column + 8 * arrays * master_row) + at
        count = end - begin
        head = count
        if p_step == p_size and g_step == g_size and step == size:
            head = head_of(p, g, m, v, tops, averages, totals, masters, mode, count)
        body = (count - head) // width * width
        i = cuda.threadIdx.x * width
        while i < body:
            j = head + i
            x, y, s = j * p_size, j * g_size, j * size
            if mode == _UPDATE:
                update_many(p + x, g + y, m + s, v + s, tops + s, averages + s, totals + s, masters + s, overwrite, c)
            elif mode == _ACCUMULATE:
                accumulate_many(g + y, totals + s, c)
            else:
                blend_many(p + x, averages + s, masters + s, overwrite, c)
            i += BLOCK * width
        i = cuda.threadIdx.x
        while i < count - body:
            j = i if i < head else i + body
            x, y, s = j * p_step, j * g_step, j * step
            if mode == _UPDATE:
                update_one(p + x, g + y, m + s, v + s, tops + s, averages + s, totals + s, masters + s, overwrite, c)
            elif mode == _ACCUMULATE:
                accumulate_one(g + y, totals + s, c)
            else:
                blend_one(p + x, averages + s, masters + s, overwrite, c)
            i += BLOCK

    def update_kernel(block, flags, expected):
        index = _row_index(block, flags, expected)
        if index >= 0:
            row = word(block + 8 * rows_at) + index * ROW_COLUMNS * size
            ends, run_count, size_of_chunk = (
                word(block + 8 * ENDS),
                word(block + 8 * RUN_COUNT),
                word(block + 8 * CHUNK),
            )
            chunks = word(block + 8 * CHUNKS)
            chunk = np.int64(cuda.blockIdx.x)
            while chunk < chunks:
                k = _find(ends, run_count, chunk)
                run = word(block + 8 * RUNS) + 8 * RUN_COLUMNS * k
                begin = _begin(ends, k, chunk, size_of_chunk)
                end = min(begin + size_of_chunk, word(run + 8 * COUNT))
                scale = get(row + 7 * size)
                if flags & CLIPPED:
                    scale = get(word(block + 8 * scales_at) + word(run + 8 * ARRAY) * size)
                chunk_update(block, row, scale, run, begin, end)
                chunk += cuda.gridDim.x
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            _finish(block, flags, index)

    return update_kernel


def _over_lanes(combine):
    """What becomes of one number of each of a block's threads, combined in a fixed tree; every thread gets it."""

    @device_function
    def over_lanes(x, lanes):
        lanes[cuda.threadIdx.x] = x
        width = BLOCK // 2
        cuda.syncthreads()
        while width > 0:
            if cuda.threadIdx.x < width:
                lanes[cuda.threadIdx.x] = combine(lanes[cuda.threadIdx.x], lanes[cuda.threadIdx.x + width])
            cuda.syncthreads()
            width //= 2
        result = lanes[0]
        cuda.syncthreads()
        return result

    return over_lanes


_sum_of_lanes = _over_lanes(device_function(lambda one, other: one + other))
_most_of_lanes = _over_lanes(device_function(lambda one, other: np.maximum(one, other)))  # NaN if one is


def square_function(g_type, compute, total):
    """The kernel that sums the squares of each fixed chunk of the gradients, in float64 and a fixed order."""
    g_size, size = SIZES[g_type], SIZES[compute]
    width = ACCESS // g_size
    dtype = {"float32": types.float32, "float64": types.float64}[compute]
    load_g, load_total = memory.elements(g_type, width, False)[0], memory.elements(compute, width, True)[0]
    load_one, load_one_total = memory.elements(g_type, 1, False)[0], memory.elements(compute, 1, False)[0]
    rows_at = ROWS if compute == "float32" else ROWS_DOUBLE
    coefficients, get = _coefficients_of(compute), memory.number(compute)[0]
    put_double = memory.number("float64")[1]
    double = True if compute == "float64" else None

    @device_function
    def load_lanes(x, g, totals, i, end, g_step, step, c):
        """`width` elements of what the norm is of, from element i on; zeros behind the end."""
        sums, one, one_total = (
            cuda.local.array(width, dtype),
            cuda.local.array(1, dtype),
            cuda.local.array(1, dtype),
        )
        g_at, total_at = g + i * g_step, totals + i * step
        aligned = g_step == g_size and g_at % ACCESS == 0
        if total is not None:
            aligned = aligned and step == size and total_at % ACCESS == 0
        if aligned and i + width <= end:
            load_g(x, g_at)
            if total is not None:
                load_total(sums, total_at)
        else:
            for k in range(width):
                x[k] = 0
                sums[k] = 0
                if i + k < end:
                    load_one(one, g_at + k * g_step)
                    x[k] = one[0]
                    if total is not None:
                        load_one_total(one_total, total_at + k * step)
                        sums[k] = one_total[0]
        if total is not None:
            for k in range(width):
                x[k] = _accumulate(sums[k], x[k], c)

    def square_kernel(block, flags, expected):
        lanes = cuda.shared.array(BLOCK, types.float64)
        x = cuda.local.array(width, dtype)
        index = max(_row_index(block, flags & STILL, expected), 0)
        row = word(block + 8 * rows_at) + index * ROW_COLUMNS * size
        c = coefficients(row, False, get(row))
        arrays, table = word(block + 8 * ARRAYS), word(block + 8 * TABLE)
        ends, run_count, chunks = (
            word(block + 8 * SQUARE_ENDS),
            word(block + 8 * RUN_COUNT),
            word(block + 8 * SQUARE_CHUNKS),
        )
        chunk = np.int64(cuda.blockIdx.x)
        while chunk < chunks:
            k = _find(ends, run_count, chunk)
            run = word(block + 8 * RUNS) + 8 * RUN_COLUMNS * k
            begin = _begin(ends, k, chunk, SQUARES)
            end = min(begin + SQUARES, word(run + 8 * COUNT))
            column = table + 8 * word(run + 8 * ARRAY)
            g = word(column + 8 * arrays * G)
            g_step, step = word(run + 8 * G_STEP), word(run + 8 * S_STEP)
            middle, big, small = np.float64(0), np.float64(0), np.float64(0)
            if g != 0:
                g += word(run + 8 * G_AT)
                totals = word(column + 8 * arrays * (M if total is None else TOTAL)) + word(run + 8 * S_AT)
                i = begin + cuda.threadIdx.x * width
                while i < end:
                    load_lanes(x, g, totals, i, end, g_step, step, c)
                    for lane in range(width):
                        value = np.float64(x[lane])
                        if double is None:
                            middle += value * value
                        elif abs(value) > _BIG:
                            big += (value * _RESCUE) * (value * _RESCUE)
                        elif abs(value) < _SMALL:
                            small += (value / _RESCUE) * (value / _RESCUE)
                        else:
                            middle += value * value
                    i += BLOCK * width
            at = word(block + 8 * PARTIALS) + 24 * chunk
            middle = _sum_of_lanes(middle, lanes)
            if double is not None:
                big, small = _sum_of_lanes(big, lanes), _sum_of_lanes(small, lanes)
            if cuda.threadIdx.x == 0:
                put_double(at, middle)
                put_double(at + 8, big)
                put_double(at + 16, small)
            chunk += cuda.gridDim.x

    return square_kernel


def norm_function():
    """The kernel, of one block per array, that adds each array's sums of squares and takes the root."""
    get, put = memory.number("float64")

    @device_function
    def total_of(partials, first, last, lanes):
        total = np.float64(0)
        k = first + cuda.threadIdx.x
        while k < last:
            total += get(partials + 24 * k)
            k += BLOCK
        return _sum_of_lanes(total, lanes)

    def norm_kernel(block, flags, expected):
        lanes = cuda.shared.array(BLOCK, types.float64)
        a = np.int64(cuda.blockIdx.x)
        partials, ranges = word(block + 8 * PARTIALS), word(block + 8 * RANGES)
        first, last = word(ranges + 16 * a), word(ranges + 16 * a + 8)
        middle = total_of(partials, first, last, lanes)
        big, small = total_of(partials + 8, first, last, lanes), total_of(partials + 16, first, last, lanes)
        if cuda.threadIdx.x == 0:
            if big > 0:
                norm = math.sqrt(big + middle * _RESCUE * _RESCUE) / _RESCUE
            elif middle > 0 or middle != middle:
                norm = math.sqrt(middle + small * _RESCUE * _RESCUE)
            else:
                norm = math.sqrt(small) * _RESCUE
            if big == big and big < math.inf and norm == math.inf and middle < math.inf:
                norm = 1.7976931348623157e308  # every element is finite
            put(word(block + 8 * NORMS) + 8 * a, norm)

    return norm_kernel


def decide_function():
    """The kernel, of one block, that makes of the norms the verdict and what each gradient is multiplied with."""
    get, put = memory.number("float64")
    put_single = memory.number("float32")[1]

    def decide_kernel(block, flags, expected):
        lanes = cuda.shared.array(BLOCK, types.float64)
        arrays, norms, control = word(block + 8 * ARRAYS), word(block + 8 * NORMS), word(block + 8 * CONTROL)
        index = max(_row_index(block, flags & STILL, expected), 0)
        row = word(block + 8 * ROWS_DOUBLE) + index * ROW_COLUMNS * 8
        factor = get(row + 8 * NORM_FACTOR)
        most, total = np.float64(0), np.float64(0)
        a = np.int64(cuda.threadIdx.x)
        while a < arrays:
            most = np.maximum(most, get(norms + 8 * a))
            a += BLOCK
        most = _most_of_lanes(most, lanes)
        whole = most
        if most > 0 and most < math.inf:
            a = np.int64(cuda.threadIdx.x)
            while a < arrays:
                part = get(norms + 8 * a) / most
                total += part * part
                a += BLOCK
            whole = min(most * math.sqrt(_sum_of_lanes(total, lanes)), 1.7976931348623157e308)
        whole *= factor
        finite = whole - whole == 0 and most - most == 0
        if cuda.threadIdx.x == 0:
            put(control + 8 * NORM, whole)
            put_word(control + 8 * GO, 1 if finite else 0)
        each, limit, scale = get(row + 8 * CLIPNORM), get(row + 8 * GLOBAL_CLIPNORM), get(row + 8 * 7)
        a = np.int64(cuda.threadIdx.x)
        while a < arrays:
            clip = np.float64(1)
            if limit > 0:
                clip = limit / np.maximum(whole, limit) + (whole - whole)
            elif each > 0:
                clip = each / np.maximum(get(norms + 8 * a) * factor, each)
            put(word(block + 8 * SCALES_DOUBLE) + 8 * a, scale * clip)
            put_single(word(block + 8 * SCALES) + 4 * a, np.float32(scale * clip))
            a += BLOCK

    return decide_kernel


def _kernel(function):
    return cuda.jit(SIGNATURE)(function)


@cache
def update_kernel(*variant):
    """`update_function`, compiled for the current device."""
    return _kernel(update_function(*variant))


@cache
def square_kernel(*variant):
    """`square_function`, compiled for the current device."""
    return _kernel(square_function(*variant))


@cache
def norm_kernel():
    """`norm_function`, compiled for the current device."""
    return _kernel(norm_function())


@cache
def decide_kernel():
    """`decide_function`, compiled for the current device."""
    return _kernel(decide_function())
