"""What kernels are told: a block of addresses and sizes, and what they read through it.

Everything is read through plain pointers: arrays, with their shapes and strides, take Numba and LLVM far longer.
"""

import numpy as np
from numba import types
from numba.extending import overload

from ..arrays.compiled import c_function, jit, numbers_at, words_at
from ..arrays.moments import BLOCK as MOMENTS_BLOCK
from ..arrays.runs import COLUMNS, COUNT, START
from ..update import LEAST_EPSILON, ROWS, Coefficients
from .intrinsics import mode_for

WHOLE = 2**30  # elements: longer than any chunk
SPAN = 8 * MOMENTS_BLOCK  # elements whose scales are found together
# What a kernel is called with is the address of a task: that of a block and, for an update, the loops that the walk is
# to call (0 where there is none; see walk.py), how many operands there are besides the first four, and which.
BLOCK, UPDATE, ASK, AVERAGES, FURTHER = range(5)
# Entries of a block: addresses, then sizes. The next three say how elements are asked for (see prefetch.py): how many
# at a time, how many bytes ahead (0 where none are), and for the cache of which level. The last are, of each operand,
# how often the distance between elements is half of that in slots of full width.
WORK, CHUNKS, TABLE, ARRAYS, FACTORS, NUMBERS, PARTIALS, SUMS, IS_FAR = range(9)
STRIDED, PIECE, AHEAD, LEVEL, HALVED = range(9, 14)
BLOCK_WORDS = HALVED + ROWS
# The numbers of a step, in a row for each group: the coefficients (see update.Coefficients), whether to overwrite the
# variables with their averages, the scale of the squares, and what the rounding of moments depends on: the seed and the
# number of the step. The last four are those of the first row.
SCALE, OVERWRITE, SQUARE_SCALE, SEED, NUMBER, HOW_MANY = 9, 12, 13, 14, 15, 16
# Rows of the factors, one number for each variable: which row of the numbers holds for it, its clip, its name (as a
# number).
WHICH, CLIP, NAME, FACTOR_ROWS = range(4)
# A record describes a piece of a chunk to a loop. Of each operand, in the order of the rows of a table: its address (0
# for a gradient that there is not) and the bytes from one element to the next; then those of slots of full width. The
# coefficients in float64 and in float32, and the group and clip that they are of. For small moments (see moments.py)
# a key and the scales of a span's blocks, and what the key follows from. How many elements the piece has, where the
# first is in the whole variable and how far apart they are there, and whether the variables become their averages. The
# task; and for a loop that cuts the piece itself, how many elements to take at a time, what to call (or 0) each time
# before to ask for others, and which element is next.
STEP, WIDTH, DOUBLES = ROWS, 2 * ROWS, 2 * ROWS + 1
FLOATS = DOUBLES + len(Coefficients._fields)
KEY = FLOATS + len(Coefficients._fields) // 2
SCALES = KEY + 1
SEEDS = SCALES + 2 * SPAN // MOMENTS_BLOCK
KNOWN = SEEDS + 3
LENGTH, FIRST, APART, OVERWRITES = range(KNOWN + 2, KNOWN + 6)
TASK, CUT, ASKS, NEXT, RECORD_WORDS = range(OVERWRITES + 1, OVERWRITES + 6)

c_kernel = c_function(types.void(types.intp, types.intp, types.intp))  # of a task, which part, of how many
c_loop = c_function(types.void(types.intp))  # of a record


@jit
def block_of(task):
    return words_at(words_at(task)[BLOCK])


@jit
def row_of_work(block, w):
    """A row of the work list (see arrays/runs.py)."""
    return words_at(block[WORK] + 8 * COLUMNS * w)


@jit
def address_in(block, row, a):
    """The address of one operand of a variable."""
    return words_at(block[TABLE])[row * block[ARRAYS] + a]


@jit
def factor_in(block, row, a):
    return numbers_at(block[FACTORS])[row * block[ARRAYS] + a]


@jit
def _first_from(block, element):
    """The first chunk that begins at an element or after it."""
    low, high = 0, block[CHUNKS]
    while low < high:
        middle = (low + high) >> 1
        if row_of_work(block, middle)[START] >= element:
            high = middle
        else:
            low = middle + 1
    return low


@jit
def share(block, part, parts):
    """The chunks that are one part's: about as many elements as any other part has.

    Where parts begin has no effect on the result: an element's update needs no other element, and a norm is summed up
    chunk by chunk.
    """
    if parts == 1:
        return 0, block[CHUNKS]
    last = row_of_work(block, block[CHUNKS] - 1)
    total = last[START] + last[COUNT]
    return _first_from(block, total * part // parts), _first_from(block, total * (part + 1) // parts)


@jit
def coefficients_of(block, a, like):
    """The coefficients of one variable, in the dtype of the arithmetic."""
    row = numbers_at(block[NUMBERS] + 8 * HOW_MANY * np.int64(factor_in(block, WHICH, a)))
    return cast_coefficients(row, factor_in(block, CLIP, a), like)


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


def entry_of_coefficients(like):
    """The entry of a record at which there are the coefficients of a type: a constant."""
    raise NotImplementedError


@overload(entry_of_coefficients, inline="always")
def _overload_entry_of_coefficients(like):
    entry = DOUBLES if like == types.float64 else FLOATS
    return lambda like: entry


@jit
def mode_of(block):
    """The floating-point mode of a step: the one that suits the smallest factor of any variable's gradient."""
    clips, least = numbers_at(block[FACTORS] + 8 * CLIP * block[ARRAYS]), 1.0
    for a in range(block[ARRAYS]):
        least = min(least, clips[a])
    return mode_for(abs(numbers_at(block[NUMBERS])[SCALE]) * least)
