"""The compiled loop: many iterations of one or many minimizations in one call, with no Python in between.

A kernel is a C function of three integers, as in kernels/cpu.py: the address of a block of addresses, and which share
of the runs to advance. It works on the very arrays of an optimizer's state that the ordinary loop works on, so that
either can take over from the other after any iteration. The objective is compiled into a C function of three addresses
(`compiled_objective`); the loop itself is compiled once for all objectives, and cached on disk.
"""

import math
import time
from collections.abc import Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, farray, njit, types
from numba.core.dispatcher import Dispatcher
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided

from . import stopping
from .coefficients import clip_factor, coefficients
from .kernels import cpu
from .kernels.cpu import _jit, _kernel, _pointer, cast_coefficients, overwrite_chunk, sum_squares, update_chunk
from .kernels.threads import PART, SERIAL_BELOW, job_calls
from .plan import CHUNK
from .schedules import LearningRateSchedule

# A block: what all runs share.
RUNS, COUNT, SIZE, ROWS, FIRST, LAST, LIMITS, CLIPS = range(8)
# A run: addresses, 0 for an array that does not exist; the last entry is where it was left for Python to go on.
EVALUATE, WORDS, X, COPY, GRADIENT, M, V, TOP, AVERAGE, BEST, BEST_GRADIENT = range(11)
PREVIOUS, LOWER, UPPER, VALUES, COUNTS, ITERATION, RECORDS, SUMS, LEFT, RUN_ENTRIES = range(11, 21)
OVERWRITE, ROW_ENTRIES = 10, 11
CLIPNORM, GLOBAL_CLIPNORM = range(2)
RECORD = 4  # fun, gradient norm, step norm, learning rate
HERE, BEFORE_UPDATE, AFTER_UPDATE = range(3)
MOST_ROWS = 2**14
SECONDS = 0.05  # of a block, about

_note, _verdict = _jit(stopping.note), _jit(stopping.verdict)
_clip_factor = njit(**cpu._OPTIONS)(clip_factor)  # not cached: the type of `max` cannot be pickled


@intrinsic
def _call_objective(typingctx, address, x, g, words):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.DoubleType(), [ir.IntType(64)] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.float64(types.intp, types.intp, types.intp, types.intp), codegen


@_jit
def _expm1(x):
    result = np.empty(x.size)
    for i in range(x.size):
        result[i] = math.expm1(x[i])
    return result


_BLOCKWISE = SimpleNamespace(expm1=_expm1, sqrt=np.sqrt, where=np.where)


def coefficient_rows(optimizer: Any, first: int, count: int) -> tuple[Any, Any]:
    """The coefficients of consecutive updates, one row each, and their learning rates."""
    steps = np.arange(first, first + count)
    if optimizer._learning_rate is None and optimizer.__dict__["_weight_decay_rate"] is None:
        rates = np.broadcast_to(np.array(optimizer._rates(first)), (count, 2))
    else:
        rates = np.array([optimizer._rates(int(step)) for step in steps])
    c = coefficients(optimizer, steps, rates[:, 0], rates[:, 1], 1.0, 1.0, _BLOCKWISE)
    rows = np.zeros((count, ROW_ENTRIES))
    for k, column in enumerate(c):
        rows[:, k] = column
    frequency = optimizer.ema_overwrite_frequency if optimizer.use_ema else None
    rows[:, OVERWRITE] = (steps + 1) % frequency == 0 if frequency else 0
    return rows, rates[:, 0]


@_jit
def _array(address, size, like):
    return carray(_pointer(address, like), size)


@_jit
def _clip(g, c, clips, sums):
    """What the gradient is multiplied with; -1 where its norm has to be taken with more care."""
    if clips[CLIPNORM] == 0 and clips[GLOBAL_CLIPNORM] == 0:
        return 1.0
    total = 0.0
    for start in range(0, g.size, CHUNK):
        total += sum_squares(g[start : start + CHUNK], None, c, 1.0, sums)
    if not 1e-280 < total < np.inf:
        return -1.0
    norm = np.sqrt(total)
    if clips[GLOBAL_CLIPNORM] > 0:
        return _clip_factor(norm, clips[GLOBAL_CLIPNORM], max)
    return clips[CLIPNORM] / np.maximum(norm, clips[CLIPNORM])


@_jit
def _largest(x):
    result = abs(x[0])
    for i in range(1, x.size):
        value = abs(x[i])
        if value > result or value != value:
            result = value
    return np.float64(result)


@_jit
def _largest_difference(x, before):
    result = abs(x[0] - before[0])
    for i in range(1, x.size):
        value = abs(x[i] - before[i])
        if value > result or value != value:
            result = value
    return np.float64(result)


@_jit
def _largest_inward(x, g, lower, upper):
    result = np.float64(0)
    for i in range(x.size):
        outward = (x[i] <= lower[i] and g[i] > 0) or (x[i] >= upper[i] and g[i] < 0)
        value = np.float64(0) if outward else np.float64(abs(g[i]))
        if value > result or value != value:
            result = value
    return result


@_jit
def _evaluate(run, x, g, size, like, values, counts):
    """Call the objective; False where it raised."""
    copy = _array(run[COPY], size, like)
    copy[:] = x
    words = _array(run[WORDS], 1, np.int64(0))
    words[0] = 0
    values[stopping.FUN] = _call_objective(run[EVALUATE], run[COPY], run[GRADIENT], run[WORDS])
    if words[0] != 0:
        return False
    if run[LOWER] == 0:
        values[stopping.GRADIENT_NORM] = _largest(g)
    else:
        lower, upper = _array(run[LOWER], size, like), _array(run[UPPER], size, like)
        values[stopping.GRADIENT_NORM] = _largest_inward(x, g, lower, upper)
    values[stopping.SIZE] = _largest(x)
    values[stopping.STEP_NORM] = _largest_difference(x, _array(run[PREVIOUS], size, like))
    counts[stopping.NFEV] += 1
    counts[stopping.NJEV] += 1
    return True


@_jit
def _project(run, x, size, like):
    if run[LOWER] != 0:
        lower, upper = _array(run[LOWER], size, like), _array(run[UPPER], size, like)
        for i in range(size):
            x[i] = np.minimum(np.maximum(x[i], lower[i]), upper[i])


@_jit
def _keep_best(run, x, g, size, like, counts):
    if run[BEST] != 0 and counts[stopping.BEST_AT] == counts[stopping.NIT]:
        _array(run[BEST], size, like)[:] = x
        _array(run[BEST_GRADIENT], size, like)[:] = g


@_jit
def _advance(block, run, like, top, average, limit):
    """Advance one run until it stops, the rows end, or Python has to go on."""
    size, first, last = block[SIZE], block[FIRST], block[LAST]
    rows = carray(_pointer(block[ROWS], 0.0), (last - first, ROW_ENTRIES))
    limits = _array(block[LIMITS], stopping.HOW_MANY_LIMITS, 0.0)
    clips = _array(block[CLIPS], 2, 0.0)
    values = _array(run[VALUES], stopping.HOW_MANY_VALUES, 0.0)
    counts = _array(run[COUNTS], stopping.HOW_MANY_COUNTS, np.int64(0))
    iteration = _array(run[ITERATION], 1, np.int64(0))
    records = carray(_pointer(run[RECORDS], 0.0), (last - first, RECORD))
    sums = _array(run[SUMS], cpu.LANES, 0.0)
    x, g = _array(run[X], size, like), _array(run[GRADIENT], size, like)
    m, v = _array(run[M], size, like), _array(run[V], size, like)
    tops = None if top is None else _array(run[TOP], size, like)
    averages = None if average is None else _array(run[AVERAGE], size, like)
    before = _array(run[PREVIOUS], size, like)
    while iteration[0] < last and counts[stopping.REASON] == stopping.GOING_ON:
        k = iteration[0] - first
        clip = _clip(g, cast_coefficients(rows[k], 1.0, 1.0, like), clips, sums)
        if clip < 0:
            run[LEFT] = BEFORE_UPDATE
            return
        c = cast_coefficients(rows[k], 1.0, clip, like)
        before[:] = x
        update_chunk(x, g, m, v, tops, averages, None, None, None if limit is None else c.limit, c)
        if rows[k, OVERWRITE] != 0:
            overwrite_chunk(x, averages, None)
        _project(run, x, size, like)
        iteration[0] += 1
        counts[stopping.NIT] += 1
        counts[stopping.EVALUATED] = 0
        if not _evaluate(run, x, g, size, like, values, counts):
            run[LEFT] = AFTER_UPDATE
            return
        _note(values, counts, limits)
        counts[stopping.EVALUATED] = 1
        _keep_best(run, x, g, size, like, counts)
        records[k, :3] = values[:3]
        counts[stopping.REASON] = _verdict(values, counts, limits)


@_jit
def _advance_share(address, part, parts, like, top, average, limit):
    block = carray(_pointer(address, np.int64(0)), 8)
    runs = carray(_pointer(block[RUNS], np.int64(0)), (block[COUNT], RUN_ENTRIES))
    for r in range(block[COUNT] * part // parts, block[COUNT] * (part + 1) // parts):
        _advance(block, runs[r], like, top, average, limit)


@cache
def _loop_kernel(dtype: str, top: Any, average: Any, limit: Any) -> Any:
    like = cpu.LIKE[dtype]

    @_kernel
    def loop_kernel(block, part, parts):
        _advance_share(block, part, parts, like, top, average, limit)

    return loop_kernel


# The objective as a C function


def _words(args: tuple[Any, ...]) -> tuple[np.ndarray[Any, Any], tuple[Any, ...], list[Any]] | None:
    """Arguments as 64-bit words (the first is a flag), what each is, and what must be kept alive; None if unknown."""
    words, specs, kept = [0], [], []
    for arg in args:
        if isinstance(arg, np.ndarray):
            array, scalar = arg, False
        elif isinstance(arg, (bool, np.bool_)) or not isinstance(arg, (int, float, np.floating, np.integer)):
            return None
        elif isinstance(arg, int) and not -(2**63) <= arg < 2**63:
            return None
        else:
            array, scalar = np.array([arg]), True
        if array.dtype.kind not in "iufc" or array.dtype.itemsize > 16 or array.dtype.name in ("float16", "longdouble"):
            return None
        if not array.flags.aligned or not array.dtype.isnative or type(array) is not np.ndarray:
            return None
        layout = "C" if array.flags.c_contiguous else "F" if array.flags.f_contiguous else "A"
        specs.append((len(words), array.dtype.str, array.shape, array.strides, layout, scalar))
        words.append(array.ctypes.data)
        kept.append(array)
    return np.array(words, np.int64), tuple(specs), kept


def _reader(spec: tuple[Any, ...]) -> Any:
    """Compiled code that makes one argument of the words."""
    at, dtype, shape, strides, layout, scalar = spec
    like = np.dtype(dtype).type(0)
    if scalar:
        return njit(lambda words: carray(_pointer(words[at], like), 1)[0])
    if layout == "C":
        return njit(lambda words: carray(_pointer(words[at], like), shape))
    if layout == "F":
        return njit(lambda words: farray(_pointer(words[at], like), shape))
    return njit(lambda words: as_strided(carray(_pointer(words[at], like), 1), shape, strides))


def _read_all(specs: tuple[Any, ...]) -> Any:
    """Compiled code that makes the tuple of all arguments."""
    if not specs:
        return njit(lambda words: ())
    read, rest = _reader(specs[0]), _read_all(specs[1:])
    return njit(lambda words: (read(words),) + rest(words))


def _both(fun: Any, jac: Any, fills: bool) -> Any:
    """Compiled code that puts the gradient where it belongs and returns the value."""
    if fills:

        def both(x, g, args):
            g[...] = 0
            return float(fun(x, g, *args))
    elif jac is True:

        def both(x, g, args):
            f, gradient = fun(x, *args)
            if gradient.shape != x.shape:
                raise ValueError("shape")
            g[...] = gradient
            return float(f)
    else:

        def both(x, g, args):
            f = fun(x, *args)
            gradient = jac(x, *args)
            if gradient.shape != x.shape:
                raise ValueError("shape")
            g[...] = gradient
            return float(f)

    return njit(both)


@lru_cache(maxsize=64)
def _objective(fun: Any, jac: Any, fills: bool, dtype: str, shape: tuple[int, ...], specs: tuple[Any, ...]) -> Any:
    """The objective as a C function of three addresses: the elements, the gradient, the words; None if it is not one.

    What it raises sets the first word; Python then calls it again, for the exception.
    """
    both, read, like = _both(fun, jac, fills), _read_all(specs), cpu.LIKE[dtype]
    entries = len(specs) + 1

    def evaluate(x_address, g_address, address):
        words = carray(_pointer(address, np.int64(0)), entries)
        x = carray(_pointer(x_address, like), shape)
        g = carray(_pointer(g_address, like), shape)
        value = np.nan
        try:
            value = both(x, g, read(words))
        except Exception:
            words[0] = 1
        return value

    try:
        return cfunc(types.float64(types.intp, types.intp, types.intp))(evaluate)
    except NumbaError:
        return None


def is_compiled(function: object) -> bool:
    """Whether a function is one of Numba's."""
    return isinstance(function, Dispatcher)


class Loop:
    """The compiled loop over some runs of one objective.

    Parameters
    ----------
    runs : list of Run
        With one array each, all of one shape and dtype.
    evaluate : compiled objective
    words, kept : lists
        For each run, the arguments, and the arrays that they lie in.
    """

    def __init__(self, runs: Sequence[Any], evaluate: Any, words: Any, kept: Any) -> None:
        self.runs, self._kept, self.optimizer = list(runs), (evaluate, kept), runs[0].optimizer
        x = runs[0].get("x")[0]
        self.rows = 16
        self.limits = runs[0].limits
        self.clips = np.array([self.optimizer.clipnorm or 0.0, self.optimizer.global_clipnorm or 0.0])
        flags = [True if on else None for on in (self.optimizer.amsgrad, self.optimizer.use_ema)]
        limit = True if self.optimizer.clipvalue else None
        self.kernel = _loop_kernel(x.dtype.name, *flags, limit).address
        self.words = [words.copy() for _ in runs]
        self.copies = [np.empty_like(x) for _ in runs]
        self.sums = np.zeros((len(runs), cpu.LANES))
        self.table = np.array([self._addresses(r, evaluate.address) for r in range(len(runs))], np.int64)
        self.block = np.zeros(8, np.int64)

    def _addresses(self, r: int, evaluate: int) -> list[int]:
        run = self.runs[r]
        slots = run.optimizer._state.slots[0]
        lower, upper = run.bounds[0] if run.bounds else (None, None)
        best = [run.get(role)[0] if role in run.roles else None for role in ("best", "best_gradient")]
        found = [self.words[r], run.get("x")[0], self.copies[r], run.get("gradient")[0]]
        found += [slots.get(key) for key in ("momentum", "velocity", "velocity_hat", "average")]
        found += [*best, run.previous[0], lower, upper, run.values, run.counts]
        found += [run.optimizer._state.scalars["iteration"], None, self.sums[r], None]
        return [evaluate, *(0 if array is None else array.ctypes.data for array in found)]

    def advance(self, most: int) -> None:
        """Advance every run that is going on by at most so many iterations."""
        count = max(1, min(self.rows, most))
        going = [run for run in self.runs if not run.reason]
        iterations = [int(run.optimizer._state.scalars["iteration"]) for run in going]
        first = min(iterations)
        start = time.perf_counter()
        rows, rates = coefficient_rows(self.optimizer, first, count)
        records = np.zeros((len(self.runs), count, RECORD))
        times = [(run.nit, run.elapsed) for run in self.runs]
        self._call(rows, records, first, count)
        for r, run in enumerate(self.runs):
            self._take_over(r, run, records[r], rates, first, times[r])
        spent = time.perf_counter() - start
        if spent < SECONDS / 2:
            self.rows = min(2 * self.rows, MOST_ROWS)
        elif spent > 2 * SECONDS:
            self.rows = max(self.rows // 2, 1)

    def _call(self, rows: Any, records: Any, first: int, count: int) -> None:
        self.table[:, RECORDS] = [record.ctypes.data for record in records]
        self.table[:, LEFT] = HERE
        size = self.copies[0].size
        self.block[:] = [self.table.ctypes.data, len(self.runs), size, rows.ctypes.data, first, first + count, 0, 0]
        self.block[[LIMITS, CLIPS]] = self.limits.ctypes.data, self.clips.ctypes.data
        elements = max(len(self.runs) * PART, SERIAL_BELOW) if len(self.runs) > 1 else 0
        for function, *arguments in job_calls(self.kernel, self.block.ctypes.data, elements, self.optimizer.threads):
            function(*arguments)  # type: ignore[operator]

    def _take_over(self, r: int, run: Any, records: Any, rates: Any, first: int, before: tuple[int, float]) -> None:
        """Note what a run has done; one iteration in Python where the compiled loop could not."""
        left, (nit, elapsed) = self.table[r, LEFT], before
        done = run.nit - nit - (left == AFTER_UPDATE)
        if done:
            at = int(run.optimizer._state.scalars["iteration"]) - (left == AFTER_UPDATE) - first
            table = np.empty((done, 6))
            table[:, 0] = np.arange(nit + 1, nit + done + 1)
            table[:, [1, 2, 4]] = records[at - done : at, :3]
            table[:, 3] = rates[at - done : at]
            table[:, 5] = elapsed + (run.elapsed - elapsed) * np.arange(1, done + 1) / done
            run.history.extend(table)
        if left == BEFORE_UPDATE:
            run.advance()
        elif left == AFTER_UPDATE:
            run.finish(float(rates[int(run.optimizer._state.scalars["iteration"]) - 1 - first]))


def compiled_loop(runs: Sequence[Any]) -> Loop | None:
    """The compiled loop over runs of one objective, or None where an option or a type needs Python at each step."""
    objective, optimizer = runs[0].objective, runs[0].optimizer
    functions = [objective.fun] if objective.jac is True else [objective.fun, objective.jac]
    leaves = runs[0].get("x")
    if not all(map(is_compiled, functions)) or objective.batches is not None or len(leaves) != 1:
        return None
    x = leaves[0]
    if type(x) is not np.ndarray or x.dtype.name not in ("float32", "float64") or not x.size:
        return None
    if isinstance(objective.container, (dict, list, tuple)) or not _in_advance(optimizer):
        return None
    described = _words(objective.args)
    if described is None:
        return None
    words, specs, kept = described
    jac = True if objective.jac is True else objective.jac
    evaluate = _objective(objective.fun, jac, objective.fills, x.dtype.name, x.shape, specs)
    return None if evaluate is None else Loop(runs, evaluate, words, kept)


def _in_advance(optimizer: Any) -> bool:
    """Whether the coefficients of a step can be computed before the steps before it have been taken."""
    rates = [optimizer._learning_rate, optimizer.__dict__["_weight_decay_rate"]]
    known = all(rate is None or isinstance(rate.function, LearningRateSchedule) or rate.takes_step for rate in rates)
    plain = optimizer.nonfinite == "propagate" and not optimizer.loss_scale_factor
    return known and plain and not optimizer.gradient_accumulation_steps
