"""The compiled loop seen from Python: coefficients of the next iterations go in, what happened comes out."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import arrays
from ..arrays.runs import CHUNK
from ..coefficients import coefficients
from ..cpu import kernels as cpu
from ..cpu.pool import WOKEN_FROM, call_helpers, helpers_of, job_call
from ..schedules import HOST, LearningRateSchedule, Schedule
from ..update import Variant
from . import loop_kernel as kernel
from .history import COLUMNS
from .objective import is_compiled
from .objective_kernel import argument_words, objective_kernel
from .parts import Parts, as_host, can_be_joined
from .python_objective import PythonObjective

# A block of iterations is one compiled call. It has as many as take about SECONDS: signals are seen and progress is
# shown between two of them.
_MOST_ROWS = 2**12
_SECONDS = 0.05
_CACHE_LINE = 64  # bytes
_ROLES = {
    kernel.X: "x",
    kernel.GRADIENT: "gradient",
    kernel.M: "momentum",
    kernel.V: "velocity",
    kernel.TOP: "velocity_hat",
    kernel.AVERAGE: "average",
    kernel.BEST: "best",
    kernel.BEST_GRADIENT: "best_gradient",
}
_BLOCKWISE = SimpleNamespace(expm1=kernel.expm1, sqrt=np.sqrt, where=np.where)


def coefficient_rows(optimizer: Any, first: int, count: int) -> tuple[Any, Any]:
    """The coefficients of consecutive updates, one column each, and their learning rates."""
    steps = np.arange(first, first + count)
    rates = _rates(optimizer, first, count)
    c = coefficients(optimizer, steps, rates[:, 0], rates[:, 1], 1.0, 1.0, _BLOCKWISE)
    rows = np.empty((kernel.ROW_ENTRIES, count))
    for k in kernel.VARYING:
        rows[k] = c[k]
    rows[: kernel.OVERWRITE, 0] = [column if np.ndim(column) == 0 else column[0] for column in c]
    frequency = optimizer.ema_overwrite_frequency if optimizer.use_ema else None
    rows[kernel.OVERWRITE] = (steps + 1) % frequency == 0 if frequency else 0
    return rows, rates[:, 0]


def _rates(optimizer: Any, first: int, count: int) -> Any:
    """Learning rate and weight decay at consecutive steps."""
    hyper, rates_at = optimizer.hyper, optimizer.engine.rates_at
    learning_rate, decay = hyper.learning_rate_function, hyper.weight_decay_function
    if learning_rate is None and decay is None:
        return np.broadcast_to(np.array(rates_at(first)[:2]), (count, 2))
    if decay is None and isinstance(learning_rate.function, Schedule):
        formula = learning_rate.function.formula
        # Its formula alone: the checks of each value take longer than an iteration of a small objective.
        rates = np.full((count, 2), optimizer.weight_decay)
        rates[:, 0] = [formula(HOST, float(step)) for step in range(first, first + count)]
        if np.isfinite(rates).all() and (rates >= 0).all():
            return rates
    return np.array([rates_at(step)[:2] for step in range(first, first + count)])


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
        optimizer, leaves = self.optimizer, runs[0].get("x")
        self.python = evaluate if isinstance(evaluate, PythonObjective) else None
        self.rows = 16
        self.threads = 1 if _is_parallel(runs[0].objective) else optimizer.threads
        self.limits = runs[0].limits
        self.clips = np.array([optimizer.clipnorm or 0.0, optimizer.global_clipnorm or 0.0])
        clips = bool(optimizer.clipvalue)
        variant = Variant(optimizer.use_ema, False, clips, optimizer.nesterov)
        dtype = np.dtype(arrays.dtype_name(leaves[0]))
        self.kernel = kernel.loop_kernel(dtype.name, optimizer.amsgrad, variant).address
        self.words = [words.copy() for _ in runs]
        self.parts = None if _is_one(leaves) else Parts(leaves)
        self._lay_out(sum(math.prod(leaf.shape) for leaf in leaves), dtype, evaluate.address)

    def _lay_out(self, size: int, dtype: np.dtype[Any], evaluate: int) -> None:
        """Write the table of addresses; small arrays get places of their own, padded to whole vectors."""
        self.size, self.padded = size, kernel.padded(size, dtype.itemsize)
        is_moved = self.padded > size or self.parts is not None
        self.copies = _aligned_zeros((len(self.runs), self.padded), dtype)
        self.inside = _aligned_zeros((len(self.runs), kernel.ARRAYS, self.padded * is_moved), dtype)
        self.views = self.parts and [self.parts.views(row[:size]) for row in self.inside[0]]
        self.sums = np.zeros((len(self.runs), cpu.LANES))
        self.before = _aligned_zeros((len(self.runs), min(self.padded, kernel.PIECE)), dtype)
        self.homes = np.zeros((len(self.runs), kernel.ARRAYS), np.int64)
        if self.parts is None:
            self.homes[:] = [[_address(leaves) for leaves in _arrays_of(run)] for run in self.runs]
        self.table = np.array([self._addresses(r, is_moved, evaluate) for r in range(len(self.runs))], np.int64)
        self.homes *= is_moved  # 0: worked on where it is, or brought in and home by Python
        self.block = np.zeros(kernel.BLOCK_ENTRIES, np.int64)

    def _addresses(self, r: int, is_moved: bool, evaluate: int) -> list[int]:
        """Where the kernel finds the arrays of a run, and all else of it."""
        run, addresses = self.runs[r], list(self.homes[r])
        if is_moved:
            pairs = zip(_arrays_of(run), self.inside[r], strict=True)
            addresses = [0 if leaves is None else row.ctypes.data for leaves, row in pairs]
        # An objective in Python makes a copy itself.
        addresses[kernel.COPY] = (
            addresses[kernel.X] if self.python and not run.is_scaled else self.copies[r].ctypes.data
        )
        found = [self.words[r], run.values, run.counts, run.optimizer.engine.state.scalars["iteration"]]
        others = [array.ctypes.data for array in (*found, self.sums[r], self.before[r])]
        return [*addresses, evaluate, *others[:4], 0, *others[4:], 0, kernel.HERE]

    def advance(self, most: int) -> None:
        """Advance every run that is going on by at most so many iterations."""
        count = max(1, min(self.rows, most))
        first = min(run.iteration for run in self.runs if not run.reason)
        start = time.perf_counter()
        rows, rates = coefficient_rows(self.optimizer, first, count)
        records = np.empty((len(self.runs), count, kernel.RECORD))
        before = [(run.nit, run.elapsed) for run in self.runs]
        self._call(rows, records, first, count)
        for r, run in enumerate(self.runs):
            self._take_over(r, run, records[r], rates, first, before[r])
        self._adapt(time.perf_counter() - start)

    def _adapt(self, spent: float) -> None:
        """Take more iterations at once, or fewer, after a block that took so many seconds."""
        if spent < _SECONDS / 2:
            self.rows = min(2 * self.rows, _MOST_ROWS)
        elif spent > 2 * _SECONDS:
            self.rows = max(self.rows // 2, 1)

    def _call(self, rows: Any, records: Any, first: int, count: int) -> None:
        self.table[:, kernel.RECORDS] = [record.ctypes.data for record in records]
        self.table[:, kernel.LEFT] = kernel.HERE
        self.block[:] = [
            *(self.table.ctypes.data, self.homes.ctypes.data, len(self.runs), self.size, self.padded),
            self.copies.itemsize,
            *(rows.ctypes.data, first, first + count),
            *(self.limits.ctypes.data, self.clips.ctypes.data, CHUNK),
        ]
        call = job_call(self.kernel, self.block.ctypes.data, WOKEN_FROM, self.threads, parts=len(self.runs))
        if helpers_of(call):
            call_helpers(helpers_of(call), WOKEN_FROM)
        function, *arguments = call
        self._bring_in()
        try:
            with self.python.called(self.words[0]) if self.python else nullcontext():
                function(*arguments)
        finally:  # what is counted and what the arrays hold belong together
            try:
                self._bring_home()
            except BaseException:  # an interrupt: it is raised when all of them are at home
                self._bring_home()
                raise

    def _bring_in(self) -> None:
        """Copy arrays that are several, or another library's, into the vectors that the kernel sees."""
        for views, leaves in zip(self.views or [], _arrays_of(self.runs[0]), strict=False):
            for view, leaf in zip(views, leaves or [], strict=False):
                view[...] = as_host(leaf)

    def _bring_home(self) -> None:
        if self.views and self.parts:
            for entry, role in _ROLES.items():
                if role in self.runs[0].roles:
                    self.runs[0].put(role, self.parts.given(self.views[entry]))

    def close(self) -> None:
        """Let go of the run: the C function around its objective refers to it, and it to the function."""
        if self.python:
            self.python.close()

    def _take_over(self, r: int, run: Any, records: Any, rates: Any, first: int, before: tuple[int, float]) -> None:
        """Note what a run has done; the rest of an iteration in Python where the compiled loop could not."""
        left, (nit, elapsed) = self.table[r, kernel.LEFT], before
        unfinished = left == kernel.AFTER_UPDATE  # counted, and not evaluated
        done = run.nit - nit - unfinished
        if done:
            end = run.iteration - unfinished - first
            _note(run, records[end - done : end], rates[end - done : end], nit, elapsed)
        if left == kernel.BEFORE_UPDATE:
            run.advance()
        elif unfinished:
            run.rate[0] = rates[run.iteration - 1 - first]
            if self.python and self.python.error is not None:
                raise self.python.error
            run.finish()


def _arrays_of(run: Any) -> list[list[Any] | None]:
    """The arrays of a run in the order of loop_kernel.py, as lists of leaves; None for those that do not exist."""
    found: list[list[Any] | None] = [None] * kernel.ARRAYS
    for entry, role in _ROLES.items():
        found[entry] = run.get(role) if role in run.roles else None
    if run.is_scaled:
        found[kernel.SCALE] = run.get("scale")
    if run.bounds:
        found[kernel.LOWER], found[kernel.UPPER] = ([pair[side] for pair in run.inner_bounds] for side in (0, 1))
        if run.is_scaled:
            found[kernel.POINT_LOWER], found[kernel.POINT_UPPER] = ([pair[s] for pair in run.bounds] for s in (0, 1))
    return found


def _address(leaves: list[Any] | None) -> int:
    return 0 if leaves is None else leaves[0].ctypes.data


def _is_one(leaves: Sequence[Any]) -> bool:
    """Whether the arrays of a run are one NumPy array, on which compiled code can work where it is."""
    return len(leaves) == 1 and type(leaves[0]) is np.ndarray


def _note(run: Any, records: Any, rates: Any, nit: int, elapsed: float) -> None:
    """Add the iterations of a block to the history of a run that had taken `nit` of them in `elapsed` seconds."""
    done, stride = len(records), run.history.stride
    kept = np.arange(-(nit + 1) % stride, done, stride)  # others would be thinned out
    kept = kept if kept.size and kept[-1] == done - 1 else np.append(kept, done - 1)
    table = np.empty((kept.size, len(COLUMNS)))
    table[:, 0] = nit + 1 + kept
    table[:, [1, 2, 4]] = records[kept, :3]
    table[:, 3] = rates[kept]
    table[:, 5] = elapsed + (run.elapsed - elapsed) * (kept + 1) / done
    run.history.extend(table)


def _is_parallel(objective: Any) -> bool:
    """Whether the objective has threads of its own: Numba's simplest layer of them ends the process if two enter it."""
    functions = [function for function in (objective.fun, objective.jac) if is_compiled(function)]
    return any(function.targetoptions.get("parallel") for function in functions)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Zeros that start with a cache line, so that no vector of a padded array lies across two."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


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
    if not arrays.is_array(objective.problem.container) or not _in_advance(optimizer):
        return None
    described = argument_words(objective.args)
    if described is None:
        return None
    words, specs, kept = described
    evaluate = objective_kernel(objective.fun, objective.jac, objective.fills, x.dtype.name, x.shape, specs)
    return None if evaluate is None else Loop(runs, evaluate, words, kept)


def loop_around_python(run: Any, maxtime: float | None) -> Loop | None:
    """The compiled loop over a run of an objective in Python, or None where something needs Python at each step."""
    leaves, optimizer = run.get("x"), run.optimizer
    if not can_be_joined(leaves) or not _in_advance(optimizer):
        return None
    rates = (optimizer.hyper.learning_rate_function, optimizer.hyper.weight_decay_function)
    if not _is_one(leaves) and (optimizer.clipnorm or optimizer.global_clipnorm):  # a norm is a sum, array by array
        return None
    # A rate of the user's may depend on what the objective does.
    if not all(rate is None or rate.is_schedule for rate in rates):
        return None
    return Loop([run], PythonObjective(run, math.inf if maxtime is None else maxtime), np.zeros(1, np.int64), None)


def _in_advance(optimizer: Any) -> bool:
    """Whether the coefficients of a step can be computed before the steps before it have been taken."""
    rates = [optimizer.hyper.learning_rate_function, optimizer.hyper.weight_decay_function]
    known = all(rate is None or isinstance(rate.function, LearningRateSchedule) or rate.takes_step for rate in rates)
    plain = optimizer.nonfinite == "propagate" and not optimizer.loss_scale_factor
    return known and plain and not optimizer.gradient_accumulation_steps
