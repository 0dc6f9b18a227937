"""One minimization in compiled code, from its first evaluation to its result: minimizer/run.py without Python.

The iterations are those of minimizer/loop_kernel.py, on the same blocks of addresses.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import coefficients as common
from ..arrays.compiled import jit, pointer
from ..cpu.kernels import LANES
from ..minimizer import loop_kernel as kernel
from ..minimizer import stopping
from ..minimizer.run import SMALLEST

STATUS = tuple(stopping.STATUS.get(reason, (-1, ""))[0] for reason in range(stopping.INTERRUPTED + 1))
DONE, FUN_RAISED, RATE_RAISED = range(3)  # how a run ends
_FIRST_ROWS, MOST_ROWS = 16, 256  # iterations whose coefficients are computed at once
_LINE = 64  # bytes
_padded = jit(kernel.padded)
_varying_of = common.varying_of


class Ways(NamedTuple):
    """The addresses of two C functions and of what they are given (see calls.py): the objective, and the rates."""

    evaluate: Any
    words: Any
    rate: Any
    rate_words: Any


class Numbers(NamedTuple):
    """Hyperparameters that do not vary."""

    weight_decay: Any
    beta_1: Any
    beta_2: Any
    epsilon: Any
    clipvalue: Any  # infinity for none
    is_corrected: Any
    nesterov: Any
    decouple_lr: Any


@jit
def run(x, lower, upper, ways, numbers, limits, first_stage, automatic, amsgrad, limit, lead):
    """Minimize from `x`, a vector within its bounds (or None), which becomes the result.

    `first_stage` is how many iterations the first of several stages has, or 0; `automatic` is True where the units of x
    are chosen here, or None, as the other flags are. Returns how it ended, the value, the iterations and the status.
    """
    width = _padded(x.size, x.itemsize)
    bounds = 0 if lower is None else 2
    count = 8 + bounds + (0 if amsgrad is None else 1) + (0 if automatic is None else 1 + bounds)
    places = _aligned_zeros(count * width, x)
    integers = np.zeros(kernel.BLOCK_ENTRIES + kernel.RUN_ENTRIES + stopping.HOW_MANY_COUNTS + 1, np.int64)
    floats = np.zeros(stopping.HOW_MANY_VALUES + 2 + LANES + MOST_ROWS * (kernel.ROW_ENTRIES + kernel.RECORD))
    # In a function of its own: what it is given lives until it returns, although it is only known by its address.
    return _run(
        x,
        lower,
        upper,
        ways,
        numbers,
        limits,
        first_stage,
        automatic,
        amsgrad,
        limit,
        lead,
        places.reshape(count, width),
        integers,
        floats,
    )


@jit
def _aligned_zeros(count, x):
    memory = np.zeros(count + _LINE // x.itemsize, x.dtype)
    start = -memory.ctypes.data % _LINE // x.itemsize
    return memory[start : start + count]


@jit
def _run(
    x,
    lower,
    upper,
    ways,
    numbers,
    limits,
    first_stage,
    automatic,
    amsgrad,
    limit,
    lead,
    places,
    integers,
    floats,
):
    like = x.dtype.type(0)
    word = np.int64(0)
    block, integers = pointer(integers.ctypes.data, word), integers[kernel.BLOCK_ENTRIES :]
    table, integers = pointer(integers.ctypes.data, word), integers[kernel.RUN_ENTRIES :]
    counts, iteration = integers[: stopping.HOW_MANY_COUNTS], integers[stopping.HOW_MANY_COUNTS :]
    values, floats = floats[: stopping.HOW_MANY_VALUES], floats[stopping.HOW_MANY_VALUES :]
    clips, sums, floats = floats[:2], floats[2 : 2 + LANES], floats[2 + LANES :]
    rows, records = floats[: MOST_ROWS * kernel.ROW_ENTRIES], floats[MOST_ROWS * kernel.ROW_ENTRIES :]
    _lay_out(table, places, lower, automatic, amsgrad)
    table[kernel.EVALUATE], table[kernel.WORDS] = ways.evaluate, ways.words
    table[kernel.VALUES], table[kernel.COUNTS] = values.ctypes.data, counts.ctypes.data
    table[kernel.ITERATION], table[kernel.RECORDS] = iteration.ctypes.data, records.ctypes.data
    table[kernel.SUMS] = sums.ctypes.data
    block[kernel.SIZE], block[kernel.PADDED], block[kernel.ITEMSIZE] = x.size, places.shape[1], x.itemsize
    block[kernel.ROWS], block[kernel.LIMITS], block[kernel.CLIPS] = (
        rows.ctypes.data,
        limits.ctypes.data,
        clips.ctypes.data,
    )
    values[stopping.PREVIOUS] = values[stopping.BEST] = values[stopping.REFERENCE] = math.inf
    values[stopping.FUN] = math.nan
    _put_in(table, x, lower, upper, automatic)

    end = DONE
    if not kernel.begin(block, table, like):
        end = FUN_RAISED
    else:
        _recover(table, values, counts, limits, x, automatic, amsgrad)
    most = _FIRST_ROWS
    while end == DONE and counts[stopping.REASON] == stopping.GOING_ON:
        first = iteration[0]
        left = np.int64(min(np.float64(most), limits[stopping.MAXITER] - first))
        if automatic is not None and first_stage > 0:
            stage = first_stage
            while stage <= first:
                stage *= 3
            left = min(left, stage - first)
            if _begins_stage(first, first_stage) and math.isfinite(values[stopping.BEST]):
                _choose_units(table, x)
                _go_on_from_best(table, values, x, automatic, amsgrad)
        if not _fill(rows, left, first, ways, numbers):
            end = RATE_RAISED
            break
        block[kernel.FIRST], block[kernel.LAST] = first, first + left
        table[kernel.LEFT] = kernel.HERE
        kernel.advance(block, table, like, amsgrad, None, limit, lead)
        if table[kernel.LEFT] != kernel.HERE:
            end = FUN_RAISED
            break
        _recover(table, values, counts, limits, x, automatic, amsgrad)
        most = min(2 * most, MOST_ROWS)
    best = math.isfinite(values[stopping.BEST]) and end == DONE
    if best:
        found = pointer(table[kernel.BEST], like)
        for i in range(x.size):
            x[i] = found[i]
    else:
        kernel.put_point(table, x.ctypes.data, 0, x.size, like)
    fun = values[stopping.BEST] if best else values[stopping.FUN]
    return end, fun, counts[stopping.NIT], iteration[0], STATUS[counts[stopping.REASON]]


@jit
def _lay_out(table, places, lower, automatic, amsgrad):
    """Give each array that there is its place."""
    row = 0
    for k in (
        kernel.X, kernel.COPY, kernel.GRADIENT, kernel.M, kernel.V, kernel.BEST, kernel.BEST_GRADIENT, kernel.BEFORE
    ):  # fmt: skip
        table[k] = places[row].ctypes.data
        row += 1
    if amsgrad is not None:
        table[kernel.TOP] = places[row].ctypes.data
        row += 1
    if automatic is not None:
        table[kernel.SCALE] = places[row].ctypes.data
        row += 1
    if lower is not None:
        table[kernel.LOWER], table[kernel.UPPER] = places[row].ctypes.data, places[row + 1].ctypes.data
        row += 2
        if automatic is not None:
            table[kernel.POINT_LOWER], table[kernel.POINT_UPPER] = (
                places[row].ctypes.data,
                places[row + 1].ctypes.data,
            )


@jit
def _put_in(table, x, lower, upper, automatic):
    """The start and its bounds, in the units to begin with: an element's size, at least 1, within its bounds' width."""
    like = x.dtype.type(0)
    inner, best = pointer(table[kernel.X], like), pointer(table[kernel.BEST], like)
    one = x.dtype.type(1)
    for i in range(x.size):
        best[i] = x[i]
        inner[i] = x[i]
        if automatic is not None:
            unit = max(abs(x[i]), one)
            if lower is not None:
                extent = upper[i] - lower[i]
                if extent > 0 and extent < unit:
                    unit = extent
                pointer(table[kernel.POINT_LOWER], like)[i] = lower[i]
                pointer(table[kernel.POINT_UPPER], like)[i] = upper[i]
            pointer(table[kernel.SCALE], like)[i] = unit
            inner[i] = x[i] / unit
        elif lower is not None:
            pointer(table[kernel.LOWER], like)[i] = lower[i]
            pointer(table[kernel.UPPER], like)[i] = upper[i]
    if automatic is not None:
        _renew_bounds(table, x)


@jit
def _renew_bounds(table, x):
    """Bring the bounds into the present units."""
    like = x.dtype.type(0)
    scale = pointer(table[kernel.SCALE], like)
    if table[kernel.LOWER] != 0:
        lower, upper = pointer(table[kernel.LOWER], like), pointer(table[kernel.UPPER], like)
        least, most = pointer(table[kernel.POINT_LOWER], like), pointer(table[kernel.POINT_UPPER], like)
        for i in range(x.size):
            lower[i] = least[i] / scale[i]
            upper[i] = most[i] / scale[i]


@jit
def _fill(rows, count, first, ways, numbers):
    """The coefficients of the next iterations, as compiled_loop.coefficient_rows gives them; False if a rate raised."""
    word = np.int64(0)
    for k in range(count):
        step = first + k
        rate = kernel.call_objective(ways.rate, step, 0, ways.rate_words)
        if pointer(ways.rate_words, word)[0] != 0:
            return False
        if not 0 <= rate < math.inf:
            raise ValueError("`learning_rate` must be a finite float >= 0 at each step. Received, and at:", rate, step)
        alpha, decay, added, lead = _varying_of(
            numbers.beta_1,
            numbers.beta_2,
            numbers.epsilon,
            numbers.is_corrected,
            numbers.nesterov,
            numbers.decouple_lr,
            step,
            rate,
            numbers.weight_decay,
            math,
        )
        rows[k], rows[count + k], rows[2 * count + k], rows[3 * count + k] = alpha, decay, added, lead
        rows[11 * count + k] = 1.0
        rows[kernel.OVERWRITE * count + k] = 0.0
    rows[4 * count], rows[5 * count] = numbers.beta_1, 1 - numbers.beta_1
    rows[6 * count], rows[7 * count] = numbers.beta_2, 1 - numbers.beta_2
    rows[8 * count], rows[9 * count], rows[10 * count] = 1.0, 1.0, numbers.clipvalue
    return True


# The automatic learning rate: as `Run.begin_stage` and `Run.recover`


@jit
def _begins_stage(iteration, first_stage):
    stage = first_stage
    while stage < iteration:
        stage *= 3
    return stage == iteration


@jit
def _choose_units(table, x):
    """The units of a later stage: an element's size where it is now, or a tenth of how far it has come."""
    like = x.dtype.type(0)
    scale, best = pointer(table[kernel.SCALE], like), pointer(table[kernel.BEST], like)
    for i in range(x.size):
        unit = max(abs(best[i]), abs(best[i] - x[i]) / x.dtype.type(10))
        scale[i] = unit if unit > 0 else x.dtype.type(1)


@jit
def _recover(table, values, counts, limits, x, automatic, amsgrad):
    """After NaN or infinity, go on from the best point in smaller units."""
    if automatic is None or counts[stopping.REASON] != stopping.NONFINITE or not math.isfinite(values[stopping.BEST]):
        return
    like = x.dtype.type(0)
    scale, best = pointer(table[kernel.SCALE], like), pointer(table[kernel.BEST], like)
    widest = size = 0.0
    for i in range(x.size):
        widest = max(widest, np.float64(scale[i] / x.dtype.type(10)))
        size = max(size, np.float64(abs(best[i])))
    if widest > SMALLEST * max(1.0, size):
        for i in range(x.size):
            scale[i] /= x.dtype.type(10)
        _go_on_from_best(table, values, x, automatic, amsgrad)
        counts[stopping.REASON] = kernel.verdict(values, counts, limits)


@jit
def _go_on_from_best(table, values, x, automatic, amsgrad):
    """Move to the best point, as if its gradient had always been the same."""
    like = x.dtype.type(0)
    _renew_bounds(table, x)
    inner, g = pointer(table[kernel.X], like), pointer(table[kernel.GRADIENT], like)
    m, v, scale = pointer(table[kernel.M], like), pointer(table[kernel.V], like), pointer(table[kernel.SCALE], like)
    best, gradient = pointer(table[kernel.BEST], like), pointer(table[kernel.BEST_GRADIENT], like)
    for i in range(x.size):
        inner[i] = best[i] / scale[i]
        g[i] = gradient[i] * scale[i]
        m[i] = g[i]
        v[i] = g[i] * g[i]
        if amsgrad is not None:
            pointer(table[kernel.TOP], like)[i] = v[i]
    values[stopping.FUN] = values[stopping.PREVIOUS] = values[stopping.BEST]
    if table[kernel.LOWER] == 0:
        values[stopping.GRADIENT_NORM] = kernel.largest(x.size, gradient)
    else:
        least, most = pointer(table[kernel.POINT_LOWER], like), pointer(table[kernel.POINT_UPPER], like)
        values[stopping.GRADIENT_NORM] = kernel.largest_inward(x.size, best, gradient, least, most, like)
