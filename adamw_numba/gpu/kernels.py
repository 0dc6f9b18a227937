"""The update on a GPU: the formula over a table of addresses, in one launch for many arrays.

A kernel takes three integers: the address of a group's descriptor (words.py), flags, and the address of the table of
addresses, of which a captured graph has one of its own. All else that changes from step to step (coefficients,
decisions, the count of steps) is read from the device's memory, so a captured graph follows a schedule.

The kernels are assembled from parts that know their options: where an option is off, a part that does nothing is put
in. So a kernel holds no code for what it does not do, without a single branch over options. Parts that several kernels
have in common are cached, since Numba takes longer to compile them than CUDA does.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda

from ..arrays.moments import NARROWER
from ..update import AVERAGE, MASTER, TOP, TOTAL, G, M, P, Storage, V, Variant
from . import masters, memory, moments, parts
from .formula import accumulate, blend, update
from .memory import ACCESS, FLOATS, SIZES, device_function, scalar_function
from .parts import entry
from .words import (
    ACCUMULATE,
    ARRAY,
    ARRAYS,
    BLEND,
    CHUNK,
    CHUNKS,
    CLIPPED,
    ENDS,
    G_AT,
    G_STEP,
    IS_UPDATE,
    NOTHING,
    OVERWRITE,
    P_AT,
    P_STEP,
    S_AT,
    S_STEP,
    SCALE,
    SCALES,
    SCALES_DOUBLE,
    THREADS,
    UPDATE,
    WHICH,
)


class Addresses(NamedTuple):
    """Where an element lies in each array."""

    p: int
    g: int
    m: int
    v: int
    top: int
    average: int
    total: int
    master: int


class Steps(NamedTuple):
    """Bytes from one element to the next."""

    p: int
    g: int
    slot: int
    moment: int
    master: int


@cache
def update_kernel(storage: Storage, variant: Variant):
    """`update_function`, compiled for the current device."""
    return parts.kernel(update_function(storage, variant), moments.most_registers(storage))


def update_function(storage: Storage, variant: Variant):
    """The kernel that takes a step with all chunks of a group: an update, an accumulation, or an average alone."""
    row_at, _ = parts.coefficients_in(storage.compute)
    scale_of, step_chunk = _scale_of(storage.compute), _step_chunk(storage, variant)

    def update_kernel(group, flags, table):
        index = parts.row_index(group, flags)
        if index >= 0:
            ends, size = entry(group, ENDS), entry(group, CHUNK)
            chunks, chunk = entry(group, CHUNKS), np.int64(cuda.blockIdx.x)
            while chunk < chunks:
                run, begin, end = parts.elements_of(group, ends, chunk, size)
                row = row_at(group, index, entry(run, WHICH))
                step_chunk(group, table, row, index, scale_of(group, row, run, flags), run, begin, end)
                chunk += cuda.gridDim.x
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            parts.finish(group, flags, index)

    return update_kernel


@cache
def _scale_of(compute):
    """What gradients are multiplied with: a number of the row, or what clipping by norm has left for their array."""
    get, size = memory.number(compute)[0], SIZES[compute]
    scales = SCALES if compute == "float32" else SCALES_DOUBLE

    @scalar_function
    def scale_of(group, row, run, flags):
        if flags & CLIPPED:
            return get(entry(group, scales) + entry(run, ARRAY) * size)
        return get(row + SCALE * size)

    return scale_of


def _step_chunk(storage, variant):
    """What a block does with a chunk: whole accesses where every array is aligned, single elements elsewhere."""
    p_size, g_size, size = SIZES[storage.p], SIZES[storage.g], SIZES[storage.compute]
    width, narrower = ACCESS // min(p_size, g_size), NARROWER[storage.moments]
    halved = masters.is_halved(storage)
    addresses_of, mode_of, head_of = (
        _addresses_of(storage, variant),
        _mode_of(storage.compute, variant.average),
        _head_of(storage, width),
    )
    walk, noise_of = _walk(storage, variant, width), moments.noise_of(storage)
    walk = moments.with_scales(walk, storage, variant, width) if storage.moments == "8bit" else walk
    _, coefficients = parts.coefficients_in(storage.compute)
    get = memory.number(storage.compute)[0]

    @device_function
    def step_chunk(group, table, row, index, scale, run, begin, end):
        mode = mode_of(group, table, row, run)
        if mode == NOTHING:
            return
        c, overwrite = coefficients(row, scale), get(row + OVERWRITE * size) != 0
        at, count = addresses_of(group, table, run, begin), end - begin
        p_step, g_step, slot = entry(run, P_STEP), entry(run, G_STEP), entry(run, S_STEP)
        steps = Steps(p_step, g_step, slot, slot >> narrower, slot >> halved)
        head = count
        if steps.p == p_size and steps.g == g_size and steps.slot == size:
            head = head_of(at, mode, count)
        walk(mode, at, head, count, steps, overwrite, c, noise_of(group, table, run, index, begin))

    return step_chunk


def _walk(storage, variant, width):
    """What a block does with elements: those of a head one by one, then whole accesses, then the rest."""
    dense, described = _dense(storage), moments.described(storage)
    step_many, step_one = _step_lanes(storage, variant, width), _step_lanes(storage, variant, 1)

    @device_function
    def walk(mode, at, head, count, steps, overwrite, c, small):
        body = (count - head) // width * width
        i = cuda.threadIdx.x * width
        while i < body:
            step_many(mode, _moved(at, head + i, dense()), overwrite, c, described(small, head + i))
            i += THREADS * width
        i = cuda.threadIdx.x
        while i < count - body:
            k = i if i < head else i + body
            step_one(mode, _moved(at, k, steps), overwrite, c, described(small, k))
            i += THREADS

    return walk


@cache
def _dense(storage):
    """The steps where elements follow each other."""
    p_size, g_size, size, m_size = SIZES[storage.p], SIZES[storage.g], SIZES[storage.compute], moments.size_of(storage)
    master_size = masters.size_of(storage)
    return scalar_function(lambda: Steps(p_size, g_size, size, m_size, master_size))


@cache
def _mode_of(compute, has_average):
    """What a step does to an array: without a gradient, an update changes its average alone."""
    get, at = memory.number(compute)[0], IS_UPDATE * SIZES[compute]
    without_gradient = BLEND if has_average else NOTHING

    @scalar_function
    def mode_of(group, table, row, run):
        is_update = get(row + at) != 0
        if entry(table, entry(group, ARRAYS) * G + entry(run, ARRAY)) == 0:
            return without_gradient if is_update else NOTHING
        return UPDATE if is_update else ACCUMULATE

    return mode_of


def _addresses_of(storage, variant):
    """Where an element of a run lies in each array."""
    wanted = {TOP: storage.amsgrad, AVERAGE: variant.average, TOTAL: variant.accumulate, MASTER: storage.master}
    # A slot that does not exist is said to lie where the momentum does, so that it says nothing new about alignment.
    top, average, total, master = (row if exists else M for row, exists in wanted.items())
    narrower, halved = NARROWER[storage.moments], masters.is_halved(storage)

    @scalar_function
    def addresses_of(group, table, run, i):
        column, arrays = table + 8 * entry(run, ARRAY), entry(group, ARRAYS)
        slot = entry(run, S_AT) + i * entry(run, S_STEP)
        return Addresses(
            entry(column, arrays * P) + entry(run, P_AT) + i * entry(run, P_STEP),
            entry(column, arrays * G) + entry(run, G_AT) + i * entry(run, G_STEP),
            entry(column, arrays * M) + (slot >> narrower),
            entry(column, arrays * V) + (slot >> narrower),
            entry(column, arrays * top) + slot,
            entry(column, arrays * average) + slot,
            entry(column, arrays * total) + slot,
            entry(column, arrays * master) + (slot >> halved),
        )

    return addresses_of


@scalar_function
def _moved(at, k, steps):
    """Where the k-th element from there on lies."""
    p, g, slot = k * steps.p, k * steps.g, k * steps.slot
    master, moment = k * steps.master, k * steps.moment
    return Addresses(
        at.p + p,
        at.g + g,
        at.m + moment,
        at.v + moment,
        at.top + slot,
        at.average + slot,
        at.total + slot,
        at.master + master,
    )


@cache
def _head_of(storage, width):
    """How many elements come before the first that is aligned in every array; all of them, if none is."""
    dense, p_size = _dense(storage), SIZES[storage.p]
    # An access to moments may be of fewer bytes; and one to those of 8 bits may not lie in two blocks.
    share = max(ACCESS // (width * moments.size_of(storage)), 1)
    most = 1 if storage.moments == "8bit" else width

    @scalar_function
    def head_of(at, mode, count):
        head = (-at.p % ACCESS) // p_size % most
        first = _moved(at, head, dense())
        bits = first.p | first.m * share | first.v * share | first.top | first.average | first.total | first.master
        if mode != BLEND:
            bits |= first.g
        return count if bits % ACCESS != 0 or head > count else head

    return head_of


def _step_lanes(storage, variant, width):
    """What a thread does with `width` neighbours, given where the first lies."""
    update_lanes = _update_lanes(storage, variant, width)
    accumulate_lanes = _accumulate_lanes(storage.g, storage.compute, width) if variant.accumulate else _do_nothing
    blend_lanes = _blend_lanes(storage, width) if variant.average else _do_nothing

    @device_function
    def step_lanes(mode, at, overwrite, c, small):
        if mode == UPDATE:
            update_lanes(at, overwrite, c, small)
        elif mode == ACCUMULATE:
            accumulate_lanes(at, overwrite, c)
        else:
            blend_lanes(at, overwrite, c)

    return step_lanes


@scalar_function
def _do_nothing(at, overwrite, c):
    return


def _update_lanes(storage, variant, width):
    """Update neighbours: every array is read once and written once, and in between they are in registers."""
    dtype = FLOATS[storage.compute]
    read_variable, write_variable = masters.reading_and_writing(storage, width)
    load_g, _ = memory.elements(storage.g, width, False)
    load_moments, store_moments = moments.loading_and_storing(storage, width)
    load_top, store_top, top_in, put_top = _slot(storage.compute, width, storage.amsgrad)
    load_average, store_average, average_in, put_average = _slot(storage.compute, width, variant.average)
    load_total, store_total, total_in, put_total = _slot(storage.compute, width, variant.accumulate)
    result = _average_or_own if variant.average else _own
    lead_in = _lead if variant.nesterov else _no_lead

    @device_function
    def update_lanes(at, overwrite, c, small):
        p, g = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        m, v = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        tops, averages = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        totals = cuda.local.array(width, dtype)
        read_variable(p, at)
        load_g(g, at.g)
        load_moments(m, v, at, small)
        load_top(tops, at.top)
        load_average(averages, at.average)
        load_total(totals, at.total)
        for k in range(width):
            top, average, total = top_in(tops, k), average_in(averages, k), total_in(totals, k)
            lead = lead_in(c)
            p[k], m[k], v[k], top, average = update(p[k], g[k], m[k], v[k], top, average, total, c.limit, lead, c)
            p[k] = result(p[k], average, overwrite)
            put_top(tops, k, top)
            put_average(averages, k, average)
            put_total(totals, k, 0)
        write_variable(p, at)
        store_moments(m, v, at, small)
        store_top(tops, at.top)
        store_average(averages, at.average)
        store_total(totals, at.total)

    return update_lanes


@cache
def _accumulate_lanes(g_type, compute, width):
    """Add neighbours of the gradient to the sum of the window."""
    dtype = FLOATS[compute]
    load_g, _ = memory.elements(g_type, width, False)
    load, store = memory.elements(compute, width, True)

    @device_function
    def accumulate_lanes(at, overwrite, c):
        g, totals = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        load_g(g, at.g)
        load(totals, at.total)
        for k in range(width):
            totals[k] = accumulate(totals[k], g[k], c)
        store(totals, at.total)

    return accumulate_lanes


@cache
def _blend_lanes(storage, width):
    """Take neighbours of a variable that has no gradient into its average."""
    dtype = FLOATS[storage.compute]
    read_variable, write_variable = masters.reading_and_writing(storage, width)
    load, store = memory.elements(storage.compute, width, True)

    @device_function
    def blend_lanes(at, overwrite, c):
        p, averages = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        read_variable(p, at)
        load(averages, at.average)
        for k in range(width):
            averages[k] = blend(averages[k], p[k], c)
        store(averages, at.average)
        if overwrite:
            write_variable(averages, at)

    return blend_lanes


def _slot(compute, width, exists):
    """Functions that load and store neighbours of a slot, get one and put one; with None where it does not exist."""
    if exists:
        return (*memory.elements(compute, width, True), _lane, _put_lane)
    return _no_access, _no_access, _no_lane, _put_no_lane


@scalar_function
def _lane(lanes, k):
    return lanes[k]


@scalar_function
def _put_lane(lanes, k, value):
    lanes[k] = value


@scalar_function
def _no_access(lanes, address):
    return


@scalar_function
def _no_lane(lanes, k):
    return None


@scalar_function
def _put_no_lane(lanes, k, value):
    return


@scalar_function
def _lead(c):
    return c.lead


@scalar_function
def _no_lead(c):
    return None


@scalar_function
def _own(p, average, overwrite):
    return p


@scalar_function
def _average_or_own(p, average, overwrite):
    return average if overwrite else p
