"""Many iterations of one or many minimizations in one compiled call, with no Python in between.

A kernel is a C function of three integers, as in cpu/kernels.py: the address of a block of addresses, and which share
of the runs to advance. It works on the very arrays that the ordinary loop works on, so that either can take over from
the other after any iteration. The objective is a C function of three addresses (objective_kernel.py): the loop is
compiled once for all objectives, and cached on disk.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ..arrays.compiled import OPTIONS, jit, jit_for_python, pointer
from ..coefficients import clip_factor
from ..cpu import kernels as cpu
from ..cpu.blocks import c_kernel, cast_coefficients
from ..cpu.exact import IN_CHUNK, steady
from ..cpu.intrinsics import exchange_mode, mode_for
from ..cpu.kernels import on, overwrite_chunk, sum_squares, update_chunk
from ..update import Variant
from . import stopping

# A block: what all runs share.
RUNS, HOMES, COUNT, SIZE, PADDED, ITEMSIZE, ROWS, FIRST, LAST, LIMITS, CLIPS, CHUNK, BLOCK_ENTRIES = range(13)
# A run: addresses, 0 for an array that does not exist; then whether it is at its best point, which is yet to be copied;
# and where it was left for Python to go on.
# Where there are units (SCALE), x, its bounds and the gradient are in them; COPY, BEST and BEST_GRADIENT are in the
# user's, and so are the bounds of points (POINT_LOWER, POINT_UPPER).
X, COPY, GRADIENT, M, V, TOP, AVERAGE, BEST, BEST_GRADIENT = range(9)
LOWER, UPPER, SCALE, POINT_LOWER, POINT_UPPER, ARRAYS = range(9, 15)
EVALUATE, WORDS, VALUES, COUNTS, ITERATION, RECORDS, SUMS, BEFORE, IS_BEST, LEFT, RUN_ENTRIES = range(14, 25)
# The rows: one column per iteration.
OVERWRITE, ROW_ENTRIES = 12, 13  # the coefficients, and whether to overwrite with the average
VARYING = (0, 1, 2, 3, 11)  # the coefficients that differ from step to step; others are in the first column
CLIPNORM, GLOBAL_CLIPNORM = range(2)
RECORD = 4  # fun, gradient norm, step norm, learning rate
HERE, BEFORE_UPDATE, AFTER_UPDATE = range(3)  # where in an iteration a run was left; HERE is between two
RAISED, PAUSED = 1, 2  # what an objective leaves in its first word: it has raised; Python has something to do
PADDING, MOST_PADDED = 32, 2**12  # bytes: a vector; and an array that is small
PIECE = 1024  # elements of an array that are moved and measured together, while they are in the fastest cache

_note, verdict = jit(stopping.note), jit(stopping.verdict)
_clip_factor = njit(**OPTIONS)(clip_factor)  # not cached: the type of `max` cannot be pickled


@intrinsic
def call_objective(typingctx, address, x, g, words):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.DoubleType(), [ir.IntType(64)] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.float64(types.intp, types.intp, types.intp, types.intp), codegen


@jit_for_python
def expm1(x):
    """The `math.expm1` of each element: NumPy's own differs in the last bit, and so would the coefficients."""
    result = np.empty(x.size)
    for i in range(x.size):
        result[i] = math.expm1(x[i]) if x[i] > -40.0 else -1.0  # what it rounds to there
    return result


@intrinsic
def _bits(typingctx, x):
    """A float as the integer of the same bits, or back."""
    pairs = {types.float32: types.int32, types.float64: types.int64}
    other = (pairs | {integer: real for real, integer in pairs.items()})[x]

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(other))

    return other(x), codegen


# Arrays are pointers here: an array that is given to a function has its references counted, at every step.


@jit
def _copy(count, to, x):
    for i in range(count):
        to[i] = x[i]


@jit
def _clip(run, clips, size, chunk, like):
    """What the gradient is multiplied with; -1 where its norm has to be taken with more care."""
    g, sums = carray(pointer(run[GRADIENT], like), size), pointer(run[SUMS], 0.0)
    total = 0.0
    for start in range(0, size, chunk):
        total += sum_squares(min(chunk, size - start), g[start:], None, None, None, sums)
    if not 1e-280 < total < np.inf:
        return -1.0
    norm = np.sqrt(total)
    if g.itemsize == 4:
        norm = steady(norm, IN_CHUNK + size // chunk + 2)
        if norm < 0:
            return -1.0
    if clips[GLOBAL_CLIPNORM] > 0:
        return _clip_factor(norm, clips[GLOBAL_CLIPNORM], max)
    return clips[CLIPNORM] / np.maximum(norm, clips[CLIPNORM])


@jit
def largest(count, x):
    """The largest magnitude, by its bits: they are in the same order, NaN above all, and as integers make vectors."""
    result = _bits(abs(x[0]))
    for i in range(1, count):
        result = max(result, _bits(abs(x[i])))
    return np.float64(_bits(result))


@jit
def _largest_difference(count, x, before):
    result = _bits(abs(x[0] - before[0]))
    for i in range(1, count):
        result = max(result, _bits(abs(x[i] - before[i])))
    return np.float64(_bits(result))


@jit
def largest_inward(count, x, g, lower, upper, zero):
    """The largest magnitude of those that do not push out of the bounds."""
    result = _bits(zero)
    for i in range(count):
        outward = ((x[i] <= lower[i]) & (g[i] > 0)) | ((x[i] >= upper[i]) & (g[i] < 0))
        result = max(result, _bits(zero if outward else abs(g[i])))
    return np.float64(_bits(result))


@jit
def _numbers(rows, steps, k):
    """The coefficients of iteration `k`; those that do not vary are in column 0 (`VARYING`)."""
    varying = rows[k], rows[steps + k], rows[2 * steps + k], rows[3 * steps + k]
    betas = rows[4 * steps], rows[5 * steps], rows[6 * steps], rows[7 * steps]
    return *varying, *betas, rows[8 * steps], rows[9 * steps], rows[10 * steps], rows[11 * steps + k]


@jit
def _project(count, x, lower, upper):
    for i in range(count):
        value = lower[i] if x[i] < lower[i] else x[i]
        x[i] = upper[i] if value > upper[i] else value


@jit
def put_point(run, to, at, count, like):
    """Write `count` elements of x, `at` bytes from its start, in the user's units: within the bounds, and exactly on
    them where x is.
    """
    x, point = pointer(run[X] + at, like), pointer(to + at, like)
    if run[SCALE] == 0:
        if to != run[X]:
            _copy(count, point, x)
        return
    scale = pointer(run[SCALE] + at, like)
    for i in range(count):
        point[i] = x[i] * scale[i]
    if run[LOWER] != 0:
        lower, upper = pointer(run[LOWER] + at, like), pointer(run[UPPER] + at, like)
        least, most = pointer(run[POINT_LOWER] + at, like), pointer(run[POINT_UPPER] + at, like)
        for i in range(count):
            value = least[i] if x[i] <= lower[i] or point[i] < least[i] else point[i]
            point[i] = most[i] if x[i] >= upper[i] or value > most[i] else value


@jit
def _evaluate(run, padded, like, values, counts):
    """Call the objective with the copy of the array; False where it raised."""
    x, g, words = pointer(run[X], like), pointer(run[GRADIENT], like), pointer(run[WORDS], np.int64(0))
    words[0] = 0
    value = call_objective(run[EVALUATE], run[COPY], run[GRADIENT], run[WORDS])
    if words[0] == RAISED:
        return False
    values[stopping.FUN] = value
    if run[LOWER] == 0:
        values[stopping.GRADIENT_NORM] = largest(padded, g)
    elif run[SCALE] == 0:
        lower, upper = pointer(run[LOWER], like), pointer(run[UPPER], like)
        values[stopping.GRADIENT_NORM] = largest_inward(padded, x, g, lower, upper, like)
    else:  # whether a gradient pushes out of the bounds is seen in the user's units
        put_point(run, run[COPY], 0, padded, like)  # again: the objective may have written into it
        lower, upper = pointer(run[POINT_LOWER], like), pointer(run[POINT_UPPER], like)
        values[stopping.GRADIENT_NORM] = largest_inward(padded, pointer(run[COPY], like), g, lower, upper, like)
    counts[stopping.NFEV] += 1
    counts[stopping.NJEV] += 1
    return True


@jit
def _keep_best(run, at, count, like):
    put_point(run, run[BEST], at, count, like)
    _copy(count, pointer(run[BEST_GRADIENT] + at, like), pointer(run[GRADIENT] + at, like))


@jit
def _scale_gradient(run, padded, like):
    g, scale = pointer(run[GRADIENT], like), pointer(run[SCALE], like)
    for i in range(padded):
        g[i] *= scale[i]


@jit
def _advance(block, run, like, top, average, limit, lead):
    """Advance one run until it stops, the rows end, or Python has to go on."""
    # One function, with all addresses read before the loop: divided into others it is 5 to 30 % slower, since the
    # compiler cannot know that no store into an array changes an address.
    size, padded, first, last = block[SIZE], block[PADDED], block[FIRST], block[LAST]
    rows, steps = pointer(block[ROWS], 0.0), last - first
    limits, clips = pointer(block[LIMITS], 0.0), pointer(block[CLIPS], 0.0)
    values, counts = pointer(run[VALUES], 0.0), pointer(run[COUNTS], np.int64(0))
    iteration, records = pointer(run[ITERATION], np.int64(0)), pointer(run[RECORDS], 0.0)
    x_at, g_at, m_at, v_at, copy_at = run[X], run[GRADIENT], run[M], run[V], run[COPY]
    top_at, average_at, lower_at, upper_at, scale_at = run[TOP], run[AVERAGE], run[LOWER], run[UPPER], run[SCALE]
    before, itemsize = pointer(run[BEFORE], like), block[ITEMSIZE]
    clipped = clips[CLIPNORM] > 0 or clips[GLOBAL_CLIPNORM] > 0
    clip = 1.0
    while iteration[0] < last and counts[stopping.REASON] == stopping.GOING_ON:
        k = iteration[0] - first
        if clipped:
            clip = _clip(run, clips, size, block[CHUNK], like)
            if clip < 0:
                run[LEFT] = BEFORE_UPDATE
                return
        c = cast_coefficients(_numbers(rows, steps, k), clip, like)
        step = extent = 0.0
        for start in range(0, padded, PIECE):
            count, at = min(PIECE, padded - start), start * itemsize
            x, g = pointer(x_at + at, like), pointer(g_at + at, like)
            m, v = pointer(m_at + at, like), pointer(v_at + at, like)
            tops = None if top is None else pointer(top_at + at, like)
            averages = None if average is None else pointer(average_at + at, like)
            if run[IS_BEST] != 0:
                _keep_best(run, at, count, like)
            _copy(count, before, x)
            mode = exchange_mode(mode_for(abs(c.scale)))
            clipped_at, ahead = None if limit is None else c.limit, None if lead is None else c.lead
            update_chunk(count, x, g, m, v, tops, averages, None, None, clipped_at, ahead, c)
            if rows[OVERWRITE * steps + k] != 0:
                overwrite_chunk(count, x, averages, None)
            exchange_mode(mode)  # back to what the objective expects
            if lower_at != 0:
                _project(count, x, pointer(lower_at + at, like), pointer(upper_at + at, like))
            put_point(run, copy_at, at, count, like)
            if scale_at != 0:
                scale = pointer(scale_at + at, like)
                for i in range(count):
                    before[i] = (x[i] - before[i]) * scale[i]
                step = np.maximum(step, largest(count, before))
            else:
                step = np.maximum(step, _largest_difference(count, x, before))
            if limits[stopping.XTOL] >= 0:
                extent = np.maximum(extent, largest(count, pointer(copy_at + at, like)))
        run[IS_BEST] = 0
        values[stopping.STEP_NORM], values[stopping.SIZE] = step, extent
        iteration[0] += 1
        counts[stopping.NIT] += 1
        counts[stopping.EVALUATED] = 0
        counts[stopping.UPDATED] = rows[k] > 0
        if not _evaluate(run, padded, like, values, counts):
            run[LEFT] = AFTER_UPDATE
            return
        _note(values, counts, limits)
        counts[stopping.EVALUATED] = 1
        # Copied by the next iteration, piece by piece, when it has all of this at hand.
        run[IS_BEST] = run[BEST] != 0 and counts[stopping.BEST_AT] == counts[stopping.NIT]
        if scale_at != 0:
            if run[IS_BEST] != 0:  # whose gradient has other units
                _keep_best(run, 0, padded, like)
                run[IS_BEST] = 0
            _scale_gradient(run, padded, like)
        counts[stopping.REASON] = verdict(values, counts, limits)
        records[RECORD * k] = values[stopping.FUN]
        records[RECORD * k + 1] = values[stopping.GRADIENT_NORM]
        records[RECORD * k + 2] = values[stopping.STEP_NORM]
        if pointer(run[WORDS], np.int64(0))[0] == PAUSED:
            return


@jit
def _bring_in(homes, run, size, like):
    """Copy the arrays of a run into their padded places."""
    for k in range(ARRAYS):
        if homes[k] != 0:
            _copy(size, pointer(run[k], like), pointer(homes[k], like))


@jit
def _bring_home(homes, run, size, like):
    for k in range(LOWER):  # bounds are only read
        if homes[k] != 0:
            _copy(size, pointer(homes[k], like), pointer(run[k], like))


@jit
def advance(block, run, like, top, average, limit, lead):
    """Advance one run, and put the best point where it belongs."""
    _advance(block, run, like, top, average, limit, lead)
    if run[IS_BEST] != 0:
        _keep_best(run, 0, block[PADDED], like)
        run[IS_BEST] = 0


@jit
def _advance_share(address, part, parts, like, top, average, limit, lead):
    word = np.int64(0)
    block = pointer(address, word)
    for r in range(block[COUNT] * part // parts, block[COUNT] * (part + 1) // parts):
        run = pointer(block[RUNS] + 8 * RUN_ENTRIES * r, word)
        homes = pointer(block[HOMES] + 8 * ARRAYS * r, word)
        _bring_in(homes, run, block[SIZE], like)
        advance(block, run, like, top, average, limit, lead)
        _bring_home(homes, run, block[SIZE], like)


@jit
def begin(block, run, like):
    """The first evaluation of a run, as `Run.start` makes it; False where the objective raised."""
    padded, scale_at = block[PADDED], run[SCALE]
    values, counts = pointer(run[VALUES], 0.0), pointer(run[COUNTS], np.int64(0))
    limits = pointer(block[LIMITS], 0.0)
    put_point(run, run[COPY], 0, padded, like)
    if not _evaluate(run, padded, like, values, counts):
        return False
    counts[stopping.COST] = 1
    _note(values, counts, limits)
    counts[stopping.EVALUATED] = 1
    if counts[stopping.BEST_AT] == counts[stopping.NIT]:
        _keep_best(run, 0, padded, like)
    if scale_at != 0:
        _scale_gradient(run, padded, like)
    counts[stopping.REASON] = verdict(values, counts, limits)
    return True


def padded(size: int, itemsize: int) -> int:
    """How many elements to work on, so that small arrays are whole vectors."""
    vector = PADDING // itemsize
    return -(-size // vector) * vector if size * itemsize <= MOST_PADDED else size


@cache
def loop_kernel(dtype: str, amsgrad: bool, variant: Variant) -> Any:
    """The kernel that advances runs whose arrays are of one dtype."""
    like, top, average = cpu.LIKE[dtype], on(amsgrad), on(variant.average)
    limit, lead = on(variant.clip), on(variant.nesterov)

    @c_kernel
    def loop_kernel(block, part, parts):
        _advance_share(block, part, parts, like, top, average, limit, lead)

    return loop_kernel
