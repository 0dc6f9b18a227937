"""One minimization: its arrays, what is known of them, and one iteration; all of it lives in the optimizer's state."""

import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.tree import Container, rebuild
from ..optimizer import AdamW
from . import stopping
from .bounds import inward, within
from .evaluation import Evaluation
from .history import COLUMNS, History
from .objective import Objective
from .problem import Problem
from .result import new_result


class Run:
    """A minimization that goes on iteration by iteration.

    Whatever a resumed run needs is an array of the optimizer's state, so that saving and restoring the optimizer saves
    and restores the run.

    Parameters
    ----------
    objective : Objective
    problem : Problem
    optimizer : AdamW
        Not built yet.
    limits : array of float64
        By the indices of stopping.py.
    capacity : int
        The most rows of history; 0 for none.
    return_best : bool
    """

    def __init__(
        self,
        objective: Objective,
        problem: Problem,
        optimizer: AdamW,
        limits: np.ndarray[Any, Any],
        capacity: int,
        return_best: bool,
    ) -> None:
        self.objective, self.problem, self.optimizer, self.limits = objective, problem, optimizer, limits
        self.names, self.bounds = problem.names, problem.bounds
        optimizer.build(rebuild(problem.container, problem.leaves))
        self.mutable = all(map(arrays.is_mutable, problem.leaves))
        self._own: list[str] = []  # the names of what is no array of AdamW's
        self._add_numbers(capacity)
        self._add_arrays(return_best)
        self.started = time.perf_counter()

    def _add_numbers(self, capacity: int) -> None:
        self.values = self._numbers("values", (stopping.HOW_MANY_VALUES,))
        self.values[[stopping.PREVIOUS, stopping.BEST, stopping.REFERENCE]] = math.inf
        self.values[stopping.FUN] = math.nan  # nothing is evaluated yet
        self.counts = self._numbers("counts", (stopping.HOW_MANY_COUNTS,), np.int64)
        rows = self._numbers("history", (capacity, len(COLUMNS)))
        last = self._numbers("history_last", (len(COLUMNS),))
        self.history = History(rows, last, self._numbers("history_marks", (2,), np.int64))
        self.clock = self._numbers("clock", (1,))  # seconds before it was resumed
        self.rate = self._numbers("rate", (1,))  # of the last update; NaN where there was none
        self.rate[0] = math.nan
        self.origin = self._numbers("origin", (2,), np.int64)  # checksums of x0 and the bounds, where it is saved

    def _numbers(self, name: str, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray[Any, Any]:
        self._own.append(name)
        array: np.ndarray[Any, Any] = self.optimizer.add_variable(shape, dtype=dtype, name=name)
        return array

    def _add_arrays(self, return_best: bool) -> None:
        leaves = self.problem.leaves
        # Immutable arrays are replaced at each update, so that the state has to hold the present ones.
        roles = ["gradient", "previous", *["best", "best_gradient"] * return_best, *["x"] * (not self.mutable)]
        self._arrays = {role: [self._array_like(role, k, x) for k, x in enumerate(leaves)] for role in roles}
        for role in ("best", "x", "previous"):
            if role in self._arrays:
                self.put(role, leaves)

    def _array_like(self, role: str, k: int, x: Array) -> str:
        name = f"{role}_{k}"
        dtype = arrays.SLOT[arrays.dtype_name(x)] if role.endswith("gradient") else arrays.dtype_name(x)
        self.optimizer.engine.state.add(name, arrays.zeros_like(x, dtype), "zeros", late=True)
        self._own.append(name)
        return name

    # Its arrays

    def get(self, role: str) -> list[Array]:
        """Live arrays, one per variable: ``x``, ``previous``, ``gradient``, ``best`` or ``best_gradient``."""
        if role == "x" and self.mutable:
            return self.problem.leaves
        return [self.optimizer.engine.state.added[True][name] for name in self._arrays[role]]

    def put(self, role: str, values: Sequence[Array]) -> None:
        """Write such arrays, or replace them where they are immutable."""
        if self.mutable:
            arrays.write_all(list(zip(self.get(role), values, strict=True)))
            return
        for name, value in zip(self._arrays[role], values, strict=True):
            added = self.optimizer.engine.state.added[True]
            added[name] = arrays.like(added[name], value)

    @property
    def roles(self) -> set[str]:
        """Which arrays it has besides AdamW's."""
        return {"x", *self._arrays}

    @property
    def iteration(self) -> int:
        """Calls of the optimizer so far, those of an earlier result that it goes on from included."""
        return int(self.optimizer.engine.state.scalars["iteration"])

    @property
    def reason(self) -> int:
        """Why it has stopped; 0 while it goes on."""
        return int(self.counts[stopping.REASON])

    @property
    def nit(self) -> int:
        """Iterations so far."""
        return int(self.counts[stopping.NIT])

    @property
    def elapsed(self) -> float:
        """Seconds so far, earlier sessions included."""
        return float(self.clock[0]) + time.perf_counter() - self.started

    # One iteration

    def start(self) -> None:
        """Evaluate where nothing has been evaluated yet, and decide whether to go on."""
        if not self.counts[stopping.EVALUATED]:
            self.evaluate()
        self.decide()

    def advance(self) -> None:
        """One update, and the evaluation of where it leads."""
        self.update()
        self.finish()

    def finish(self) -> None:
        """The second half of an iteration: evaluate, and decide whether to go on."""
        self.evaluate()
        self.decide()

    def decide(self) -> None:
        """Stop, if there is a reason to."""
        self.stop(stopping.verdict(self.values, self.counts, self.limits))

    def stop(self, reason: int) -> None:
        """Stop for one of the reasons of stopping.py."""
        self.counts[stopping.REASON] = reason

    def update(self) -> None:
        """Move the arrays against their gradients, and into the bounds."""
        self.put("previous", self.get("x"))
        before = self.optimizer.iterations
        self.counts[stopping.EVALUATED] = 0
        gradients = self.get("gradient")
        if self.mutable:
            self.optimizer.apply(gradients)
        else:
            self._apply_statelessly(gradients)
        if self.bounds is not None:
            self.put("x", within(self.get("x"), self.bounds))
        self.counts[stopping.NIT] += 1
        self.rate[0] = self.optimizer.last_step.learning_rate  # type: ignore[union-attr]
        self.counts[stopping.UPDATED] = self.optimizer.iterations > before and self.rate[0] > 0

    def _apply_statelessly(self, gradients: list[Array]) -> None:
        optimizer = self.optimizer
        before, rate = optimizer.iterations, optimizer.learning_rate
        new, state = optimizer.stateless_apply(optimizer.variables, gradients, self.get("x"))
        optimizer.set_weights(state)
        self.put("x", new)
        optimizer.engine.record.last = None, optimizer.iterations > before, rate

    def evaluate(self) -> None:
        """Value and gradient where the last update has led, and what they mean for the tolerances."""
        evaluation = self.objective.evaluate(self.get("x"), self.nit)
        self._measure(evaluation)
        stopping.note(self.values, self.counts, self.limits)
        self.counts[stopping.EVALUATED] = 1
        if "best" in self._arrays and self.counts[stopping.BEST_AT] == self.nit:
            self.put("best", self.get("x"))
            self.put("best_gradient", self.get("gradient"))
        self.history.extend(np.array([[self.nit, *self.values[:2], self.rate[0], self.values[2], self.elapsed]]))

    def _measure(self, evaluation: Evaluation) -> None:
        x, likes = self.get("x"), self.get("gradient")
        self.put("gradient", [_cast(g, like) for g, like in zip(evaluation.gradients, likes, strict=True)])
        gradients = self.get("gradient") if self.bounds is None else inward(x, self.get("gradient"), self.bounds)
        moves = [_difference(*pair) for pair in zip(x, self.get("previous"), strict=True)]
        self.values[stopping.FUN] = evaluation.value
        self.values[stopping.GRADIENT_NORM] = _largest(gradients)
        self.values[stopping.SIZE] = _largest(x)
        self.values[stopping.STEP_NORM] = _largest(moves)
        self.counts[stopping.NFEV] += evaluation.calls
        self.counts[stopping.NJEV] += 1
        self.counts[stopping.COST] = evaluation.calls

    # What comes out

    def result(self) -> Any:
        """The result as it stands."""
        best = "best" in self._arrays and math.isfinite(self.values[stopping.BEST])
        status, message = stopping.STATUS.get(self.reason, (-1, "Still going on."))
        fields = {
            "message": message,
            "success": status == 0,
            "status": status,
            "fun": float(self.values[stopping.BEST if best else stopping.FUN]),
            "x": self._out("best" if best else "x"),
            "nit": self.nit,
            "jac": self._out("best_gradient" if best else "gradient"),
            "nfev": int(self.counts[stopping.NFEV]),
            "njev": int(self.counts[stopping.NJEV]),
            "fun_last": float(self.values[stopping.FUN]),
            "x_last": self._out("x"),
            "history": self.history.columns(),
            "state": self._state(),
        }
        if self.optimizer.use_ema and self.optimizer.iterations:
            fields["x_average"] = self._average()
        return new_result(fields)

    def intermediate(self) -> Any:
        """What a callback is given."""
        return new_result(
            {
                "x": self._out("x"),
                "fun": float(self.values[stopping.FUN]),
                "nit": self.nit,
                "gradient_norm": float(self.values[stopping.GRADIENT_NORM]),
            }
        )

    def _out(self, role: str) -> Container:
        return rebuild(self.problem.container, [arrays.like(array, array) for array in self.get(role)])

    def _state(self) -> dict[str, Array]:
        """Copies of AdamW's own arrays, by name."""
        live = {name: array for name, array in self.optimizer.state.items() if name not in self._own}
        return {name: np.array(a) if isinstance(a, np.ndarray) else arrays.like(a, a) for name, a in live.items()}

    def _average(self) -> Container:
        average = [arrays.like(x, a) for x, a in zip(self.get("x"), self.optimizer.averages, strict=True)]
        return rebuild(self.problem.container, average if self.bounds is None else within(average, self.bounds))

    # Saving

    def stamp(self) -> None:
        """Note the time, before the state is saved."""
        self.clock[0], self.started = self.elapsed, time.perf_counter()

    def sign(self) -> None:
        """Note the checksums of where it starts, before anything moves."""
        bounds = [bound for pair in self.bounds or [] for bound in pair]
        self.origin[:] = [_checksum(self.problem.leaves), _checksum(bounds)]


def _checksum(leaves: Sequence[Array]) -> int:
    total = 0
    for leaf in leaves:
        total = zlib.crc32(np.ascontiguousarray(arrays.to_numpy(leaf)).tobytes(), total)
    return total


def _largest(leaves: Sequence[Array]) -> float:
    """The largest magnitude of any element; NaN if one is."""
    found = [float(_magnitude(leaf)) for leaf in leaves if 0 not in leaf.shape]
    return float(np.max(found, initial=0.0))


def _magnitude(leaf: Array) -> Array:
    if isinstance(leaf, np.ndarray):
        return np.abs(leaf).max()
    xp = arrays.namespace(leaf)
    return xp.max(xp.abs(leaf))


def _difference(x: Array, before: Array) -> Array:
    with np.errstate(all="ignore"):
        return x - before


def _cast(gradient: Array, like: Array) -> Array:
    """A gradient in the dtype of its buffer; what is too large becomes infinite."""
    if gradient.dtype == like.dtype:
        return gradient
    if isinstance(gradient, np.ndarray):
        with np.errstate(all="ignore"):
            return gradient.astype(like.dtype)
    return arrays.namespace(gradient).astype(gradient, like.dtype)
