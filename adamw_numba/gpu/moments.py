"""Moments on a GPU: how a kernel loads and stores them, and what rounding them to 16 and 8 bits follows from.

These are parts, like those of kernels.py, which puts them together: `noise_of` is for a chunk, `described` for one
access of a thread, and `loading_and_storing` for the moments in it. For 8 bits, `with_scales` is put around the walk of
a chunk, since the scales of a block have to be known before its first moment is rounded: see cpu/moments.py.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from ..arrays.moments import BLOCK, NARROWER, make_rounding
from ..update import M_SCALE, V_SCALE, Storage, Variant
from . import masters, memory
from .formula import update
from .memory import (
    FLOATS,
    SIZES,
    ask_for,
    bits_of,
    choose,
    device_function,
    most_of_warp,
    number_of,
    scalar_function,
    unsigned,
)
from .parts import entry
from .words import (
    ARRAY,
    ARRAYS,
    FIRST,
    HEADER,
    MOST_SCALES,
    NAME,
    PLACE,
    PLACE_COLUMNS,
    PLACE_STEP,
    PLACES,
    RUN_COLUMNS,
    RUNS,
    S_AT,
    S_STEP,
    SEED,
    THREADS,
    UPDATE,
    WARP,
)

# Of each block, in memory that the threads share: the largest of what leads to its scales, as words; then its old
# scales, and what its new moments are multiplied with.
_LARGEST_G, _LARGEST_M, _LARGEST_V, _LARGEST_TOTAL, _WORDS = range(5)
_OLD_M, _OLD_V, _INVERSE_M, _INVERSE_V, _NUMBERS = range(5)
_ROOM = MOST_SCALES * max(_WORDS, _NUMBERS)
_get, _put = memory.number("float32")


class Noise(NamedTuple):
    """The place of an element in the whole variable, how far the next is from it, and the key of the noise."""

    place: int
    step: int
    key: int


class Chunk(NamedTuple):
    """The noise of a chunk of moments of 8 bits, and where the scales of its first block lie."""

    noise: Noise
    m_scale: int
    v_scale: int


class Access(NamedTuple):
    """The noise of neighbours in one block, its old scales, and what new moments are multiplied with."""

    noise: Noise
    m_scale: float
    v_scale: float
    m_inverse: float
    v_inverse: float


def most_registers(storage: Storage) -> int | None:
    """How many registers a thread may have, if not as many as the compiler likes.

    So that a processor has room for three blocks of threads, or for two where an access is of eight elements: some
    kernels would take a few more. CUDA's assembler finds that many to be enough: it keeps nothing elsewhere, except
    4 to 16 bytes of a thread in some kernels that accumulate.
    """
    if storage.moments == "float32":
        return None
    return 80 if storage.p == storage.g == "float32" else 128


_R = make_rounding(scalar_function, unsigned, bits_of, number_of, choose)
_key, _term, _noise, _to_bfloat, _from_bfloat, _scale_of, _inverse_of = _R[:7]
_to_momentum, _from_momentum, _to_velocity, _from_velocity = _R[7:]


def size_of(storage: Storage) -> int:
    """Bytes of one moment."""
    return SIZES[storage.compute] >> NARROWER[storage.moments]


def noise_of(storage: Storage):
    """What the rounding of a chunk follows from: its first element, and the step that the GPU has counted."""
    if storage.moments == "float32":
        return _no_noise

    @scalar_function
    def noise_of(group, table, run, index, begin):
        places = entry(group, PLACES) + (run - entry(group, RUNS)) // RUN_COLUMNS * PLACE_COLUMNS
        header, step = entry(group, HEADER), entry(places, PLACE_STEP)
        # Row `index` is that of the step after so many others, also in a graph that is replayed.
        number = entry(header, FIRST) + index
        key = _key(unsigned(entry(header, SEED)), unsigned(entry(places, NAME)), unsigned(number))
        return Noise(unsigned(entry(places, PLACE) + begin * step), unsigned(step), key)

    @scalar_function
    def chunk_of(group, table, run, index, begin):
        column, arrays = table + 8 * entry(run, ARRAY), entry(group, ARRAYS)
        # Four bytes of a scale for each block, where an element has four in other slots.
        at = (entry(run, S_AT) + begin * entry(run, S_STEP)) // BLOCK
        m_scale, v_scale = entry(column, arrays * M_SCALE) + at, entry(column, arrays * V_SCALE) + at
        return Chunk(noise_of(group, table, run, index, begin), m_scale, v_scale)

    return chunk_of if storage.moments == "8bit" else noise_of


@scalar_function
def _no_noise(group, table, run, index, begin):
    return None


def described(storage: Storage):
    """What is to be known of an access, given that of its chunk, and which of its elements is the first."""
    return {"float32": _not_at_all, "bfloat16": _noise_at, "8bit": _with_its_scales}[storage.moments]


@scalar_function
def _not_at_all(small, i):
    return None


@scalar_function
def _noise_at(small, i):
    return Noise(unsigned(small.place + i * small.step), small.step, small.key)


@scalar_function
def _with_its_scales(small, i):
    noise, kept = small
    k = i // BLOCK * _NUMBERS
    return Access(_noise_at(noise, i), kept[k + _OLD_M], kept[k + _OLD_V], kept[k + _INVERSE_M], kept[k + _INVERSE_V])


def loading_and_storing(storage: Storage, width: int):
    """Functions that load and store both moments of neighbours."""
    if storage.moments == "float32":
        return _wide(storage.compute, width)
    load, store = memory.codes(8 * size_of(storage), width, True)
    from_codes, to_codes = (_from_bytes, _to_bytes) if storage.moments == "8bit" else (_from_halves, _to_halves)

    @device_function
    def load_both(m, v, at, own):
        m_codes, v_codes = cuda.local.array(width, types.uint32), cuda.local.array(width, types.uint32)
        load(m_codes, at.m)
        load(v_codes, at.v)
        for k in range(width):
            m[k], v[k] = from_codes(unsigned(m_codes[k]), unsigned(v_codes[k]), own)

    @device_function
    def store_both(m, v, at, own):
        m_codes, v_codes = cuda.local.array(width, types.uint32), cuda.local.array(width, types.uint32)
        for k in range(width):
            m_codes[k], v_codes[k] = to_codes(m[k], v[k], k, own)
        store(m_codes, at.m)
        store(v_codes, at.v)

    return load_both, store_both


@cache
def _wide(compute, width):
    load, store = memory.elements(compute, width, True)

    @scalar_function
    def load_both(m, v, at, own):
        load(m, at.m)
        load(v, at.v)

    @scalar_function
    def store_both(m, v, at, own):
        store(m, at.m)
        store(v, at.v)

    return load_both, store_both


@scalar_function
def _bits_for(noise, k):
    return _noise(_term(unsigned(noise.place + k * noise.step), noise.key))


@scalar_function
def _from_halves(m, v, own):
    return _from_bfloat(m), _from_bfloat(v)


@scalar_function
def _to_halves(m, v, k, own):
    bits = _bits_for(own, k)
    return _to_bfloat(m, unsigned(bits & unsigned(0xFFFF))), _to_bfloat(v, unsigned(bits >> unsigned(16)))


@scalar_function
def _from_bytes(m, v, own):
    return _from_momentum(m) * own.m_scale, _from_velocity(v) * own.v_scale


@scalar_function
def _to_bytes(m, v, k, own):
    bits = _bits_for(own.noise, k)
    return _to_momentum(m, own.m_inverse, bits), _to_velocity(v, own.v_inverse, bits)


def with_scales(walk, storage: Storage, variant: Variant, width: int):
    """A walk of chunks that finds the scales of their blocks first; a chunk begins with a block.

    All threads of a block of threads read what leads to the scales, a few of them make scales of it, and all use those.
    What was read comes from the cache the second time.
    """
    look_at_many, look_at_one = _look(storage, variant, width), _look(storage, variant, 1)
    ask_for_all = _ask_for_all(storage, variant, width)
    total_in = _total if variant.accumulate else _no_total

    @device_function
    def renew_scales(largest, kept, chunk, count, c):
        """Find the new scales by the bounds that the formula gives, and keep the old ones, which all still need."""
        up, zero = np.float32(-1 if c.scale < 0 else 1), np.float32(0)
        j = cuda.threadIdx.x
        while j * BLOCK < count:
            m_at, v_at, k, n = chunk.m_scale + 4 * j, chunk.v_scale + 4 * j, j * _WORDS, j * _NUMBERS
            m_scale, v_scale = _get(m_at), _get(v_at)
            g = up * number_of(unsigned(largest[k + _LARGEST_G]))
            total = total_in(largest, k, up)
            m = _from_momentum(unsigned(largest[k + _LARGEST_M])) * m_scale
            v = _from_velocity(unsigned(largest[k + _LARGEST_V])) * v_scale
            bounds = update(zero, g, m, v, None, None, total, c.limit, None, c)
            m_bits, v_bits = _scale_of(bits_of(bounds[1])), _scale_of(bits_of(bounds[2]))
            kept[n + _OLD_M], kept[n + _OLD_V] = m_scale, v_scale
            kept[n + _INVERSE_M], kept[n + _INVERSE_V] = number_of(_inverse_of(m_bits)), number_of(_inverse_of(v_bits))
            _put(m_at, number_of(m_bits))
            _put(v_at, number_of(v_bits))
            j += THREADS

    @device_function
    def walk_blocks(mode, at, head, count, steps, overwrite, c, chunk):
        largest = cuda.shared.array(_ROOM, types.uint32)
        kept = cuda.shared.array(_ROOM, types.float32)
        if mode == UPDATE:  # of the whole chunk, so for all threads
            ask_for_all(at, count)
            k = cuda.threadIdx.x
            while k < _ROOM:
                largest[k] = 0
                k += THREADS
            cuda.syncthreads()
            body = 0 if head > 0 else count // width * width
            look_at_many(largest, at, 0, body)
            look_at_one(largest, at, body, count)
            cuda.syncthreads()
            renew_scales(largest, kept, chunk, count, c)
            cuda.syncthreads()
        # The numbers of the next chunk are written two barriers later, when all threads are done with these.
        walk(mode, at, head, count, steps, overwrite, c, (chunk.noise, kept))

    return walk_blocks


def _ask_for_all(storage, variant, width):
    """Ask for all that a chunk needs.

    Otherwise a thread would wait for the memory in every round, when it looks and again when it updates, with little
    under way meanwhile: moments are few bytes, and a kernel of that many registers has few threads.
    """
    p_size, g_size, size = SIZES[storage.p], SIZES[storage.g], SIZES[storage.compute]
    exists = storage.amsgrad, variant.average, variant.accumulate, storage.master
    top, average, total, master = (ask_for if wanted else _do_not_ask for wanted in exists)
    master_size = masters.size_of(storage)

    @device_function
    def ask_for_all(at, count):
        i = np.int64(cuda.threadIdx.x * width)
        while i < count:
            ask_for(at.g + i * g_size)
            ask_for(at.m + i)
            ask_for(at.v + i)
            ask_for(at.p + i * p_size)
            top(at.top + i * size)
            average(at.average + i * size)
            total(at.total + i * size)
            master(at.master + i * master_size)
            i += THREADS * width

    return ask_for_all


@scalar_function
def _do_not_ask(address):
    return


def _look(storage, variant, width):
    """Find the largest gradients, moments and sums of the window of each block, from one element to another."""
    load_g, _ = memory.elements(storage.g, width, False)
    load_codes, _ = memory.codes(8, width, False)
    dtype, g_size, size = FLOATS[storage.compute], SIZES[storage.g], SIZES[storage.compute]
    load_totals, larger_total, note_total = _no_totals, _as_it_was, _no_note
    if variant.accumulate:
        load_totals, _ = memory.elements(storage.compute, width, False)
        larger_total, note_total = _larger_magnitude, _note

    @device_function
    def look(largest, at, first, last):
        gs, totals = cuda.local.array(width, dtype), cuda.local.array(width, dtype)
        m_codes, v_codes = cuda.local.array(width, types.uint32), cuda.local.array(width, types.uint32)
        lane = cuda.threadIdx.x % WARP
        i = first + cuda.threadIdx.x * width
        # What a warp takes in one round lies in one block; and all of its threads are needed to compare.
        while i - lane * width < last:
            g = m = v = total = unsigned(0)
            if i < last:
                load_g(gs, at.g + i * g_size)
                load_codes(m_codes, at.m + i)
                load_codes(v_codes, at.v + i)
                load_totals(totals, at.total + i * size)
                for k in range(width):
                    g = _larger_magnitude(g, gs, k)
                    m = _larger(m, unsigned(m_codes[k] & unsigned(127)))
                    v = _larger(v, unsigned(v_codes[k]))
                    total = larger_total(total, totals, k)
            block = (i - lane * width) // BLOCK * _WORDS
            _note(largest, block + _LARGEST_G, g, lane)
            _note(largest, block + _LARGEST_M, m, lane)
            _note(largest, block + _LARGEST_V, v, lane)
            note_total(largest, block + _LARGEST_TOTAL, total, lane)
            i += THREADS * width

    return look


@device_function
def _note(largest, k, x, lane):
    x = most_of_warp(x)
    if lane == 0:
        cuda.atomic.max(largest, k, x)


@scalar_function
def _larger(one, other):
    return other if other > one else one


@scalar_function
def _larger_magnitude(largest, lanes, k):
    """Of magnitudes as bits: those of a NaN are larger than all others."""
    return _larger(largest, unsigned(bits_of(lanes[k]) & unsigned(0x7FFFFFFF)))


@scalar_function
def _total(largest, k, up):
    return up * number_of(unsigned(largest[k + _LARGEST_TOTAL]))


# Where nothing is accumulated


@scalar_function
def _no_totals(lanes, address):
    return


@scalar_function
def _as_it_was(largest, lanes, k):
    return largest


@scalar_function
def _no_note(largest, k, x, lane):
    return


@scalar_function
def _no_total(largest, k, up):
    return None
