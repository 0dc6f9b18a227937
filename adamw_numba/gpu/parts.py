"""What all kernels are made of: whose turn it is, which coefficients it is to use, and which elements.

Every group of arrays (those stored alike) counts the steps it has done. A launch does nothing unless it is its group's
turn: so a skipped step is one whose counter did not move.
"""

from functools import cache

from numba import cuda, types

from ..update import Coefficients
from . import memory
from .memory import SIMULATED, SIZES, add_word, device_function, put_word, scalar_function, word
from .words import (
    CONTROL,
    COUNT,
    COUNTERS,
    EXHAUSTED,
    FINISHED,
    FIRST,
    GO,
    GROUP,
    GROUPS,
    GUARDED,
    HEADER,
    NO_ROW,
    NOT_NOW,
    ROW_COLUMNS,
    ROW_COUNT,
    ROWS,
    ROWS_DOUBLE,
    RUN_COLUMNS,
    RUN_COUNT,
    RUNS,
    SETS,
    SKIP,
    SKIPPED,
    STILL,
)

SIGNATURE = types.void(types.int64, types.int64, types.int64)  # descriptor of a group, flags, table of addresses
# How every kernel is compiled; the simulator knows no options. There is nothing to link, and where the linker optimizes
# once more, an H100 takes bfloat16 with all options at 86 instead of 91 % of its bandwidth.
OPTIONS = {} if SIMULATED else {"lto": False}


def kernel(function, registers=None):
    """Compile a function for the current device, without asking for the types of its arguments at each launch.

    Of no more registers than so many for each thread.
    """
    most = {} if SIMULATED or registers is None else {"max_registers": registers}
    return cuda.jit(SIGNATURE, **OPTIONS, **most)(function)


@scalar_function
def entry(base, k):
    """The k-th word from an address on."""
    return word(base + 8 * k)


@scalar_function
def put_entry(base, k, value):
    """Write the k-th word."""
    put_word(base + 8 * k, value)


@scalar_function
def _is_in_turn(group, counters, counter):
    """Whether a group comes next: the first once the last has done the step before, the others after one another."""
    own = entry(group, GROUP)
    if own == 0:
        return entry(counters, entry(group, GROUPS) - 1) == counter
    return entry(counters, own - 1) == counter + 1


@scalar_function
def row_index(group, flags):
    """Which row of coefficients a group is to use now; a negative number if it is to do nothing."""
    if flags & STILL:
        return 0
    control, header = entry(group, CONTROL), entry(group, HEADER)
    counters = control + 8 * COUNTERS
    counter = entry(counters, entry(group, GROUP))
    if not _is_in_turn(group, counters, counter):
        return NOT_NOW
    index = counter - entry(header, FIRST)
    if index < 0 or index >= entry(header, ROW_COUNT):
        return NO_ROW
    # Only the first group asks: where it skips, it is never the others' turn.
    if entry(group, GROUP) == 0 and flags & GUARDED and entry(control, GO) == 0:
        return SKIP
    return index


@device_function
def finish(group, flags, index):
    """Have the last block of a launch count the group's step, or note why there was none.

    Only then: blocks that begin later than others still have to find it their turn.
    """
    control = entry(group, CONTROL)
    if add_word(control + 8 * FINISHED, 1) != cuda.gridDim.x - 1:
        return
    put_entry(control, FINISHED, 0)
    if index == NO_ROW:
        put_entry(control, EXHAUSTED, 1)
    elif index == SKIP:
        put_entry(control, SKIPPED, entry(control, SKIPPED) + 1)
    elif index >= 0 and not flags & STILL:
        counter = COUNTERS + entry(group, GROUP)
        put_entry(control, counter, entry(control, counter) + 1)


@scalar_function
def _first_above(ends, count, chunk):
    """Which of the ascending ends is the first above a chunk's number."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if entry(ends, middle) > chunk:
            high = middle
        else:
            low = middle + 1
    return low


@scalar_function
def elements_of(group, ends, chunk, size):
    """The run that a chunk belongs to, and its elements there: the first, and the one after the last."""
    k = _first_above(ends, entry(group, RUN_COUNT), chunk)
    run = entry(group, RUNS) + 8 * RUN_COLUMNS * k
    before = entry(ends, k - 1) if k > 0 else 0
    begin = (chunk - before) * size
    return run, begin, min(begin + size, entry(run, COUNT))


@cache
def coefficients_in(compute):
    """Functions that give the address of a row in a compute type, of a step and a set, and the coefficients in it."""
    get, size = memory.number(compute)[0], SIZES[compute]
    rows = ROWS if compute == "float32" else ROWS_DOUBLE

    @scalar_function
    def row_at(group, index, which):
        return entry(group, rows) + (index * entry(group, SETS) + which) * ROW_COLUMNS * size

    @scalar_function
    def coefficients(row, scale):
        return Coefficients(
            get(row),
            get(row + size),
            get(row + 2 * size),
            get(row + 3 * size),
            get(row + 4 * size),
            get(row + 5 * size),
            get(row + 6 * size),
            get(row + 7 * size),
            get(row + 8 * size),
            scale,
            get(row + 10 * size),
            get(row + 11 * size),
        )

    return row_at, coefficients
