"""One minimization: its arrays, what is known of them, and one iteration; all of it lives in the optimizer's state."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.tree import Container, flatten, rebuild
from ..optimizer import AdamW
from . import stopping
from .automatic import Stages
from .bounds import Bounds, inward, within
from .evaluation import Evaluation
from .history import COLUMNS, History
from .measures import cast, checksum, difference, largest
from .objective import Objective
from .problem import Problem
from .result import new_result
from .scaling import divided, multiplied, onto_bounds, scale_of_stage
from .warm_start import take_state

SMALLEST = 1e-12  # units, in that of x, down to which a run goes on after NaN or infinity


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
    return_best, keep_best : bool
        Whether the best point is the result; and whether something else needs it.
    chooses_units : bool
        Whether it may change those of the problem.
    together : ranks.agreement.Agreement, optional
        What connects its optimizer with those of other processes.
    """

    def __init__(
        self,
        objective: Objective,
        problem: Problem,
        optimizer: AdamW,
        limits: np.ndarray[Any, Any],
        capacity: int,
        return_best: bool,
        keep_best: bool,
        chooses_units: bool,
        *,
        together: Any = None,
    ) -> None:
        self.objective, self.problem, self.optimizer, self.limits = objective, problem, optimizer, limits
        self.names, self.bounds = problem.names, problem.bounds
        function = optimizer.hyper.learning_rate_function
        self.stages = function.function if function and isinstance(function.function, Stages) else None
        self.chooses_units = chooses_units
        self.is_scaled = problem.scale is not None
        # What the optimizer moves: x, in its units where it has some.
        self._variables = problem.leaves if problem.scale is None else divided(problem.leaves, problem.scale)
        optimizer.engine.build(flatten(problem.container)[0], self._variables, together)
        self.mutable = all(map(arrays.is_mutable, self._variables))
        self._own: list[str] = []  # the names of what is no array of AdamW's
        self._add_numbers(capacity)
        self._returns_best = return_best
        self._add_arrays(return_best or keep_best)
        self._inner_bounds: Bounds | None = None if self.is_scaled else problem.bounds
        self.renew_bounds()
        self.remark = ""  # to be added to the message
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

    def _add_arrays(self, keeps_best: bool) -> None:
        leaves = self.problem.leaves
        # Immutable arrays are replaced at each update, so that the state has to hold the present ones.
        roles = ["gradient", *["best", "best_gradient"] * keeps_best, *["x"] * (not self.mutable)]
        roles += ["scale"] * self.is_scaled
        self._arrays = {role: [self._array_like(role, k, x) for k, x in enumerate(leaves)] for role in roles}
        starts = {"best": leaves, "x": self._variables, "scale": self.problem.scale}
        for role, values in starts.items():
            if role in self._arrays:
                self.put(role, values)  # type: ignore[arg-type]

    def _array_like(self, role: str, k: int, x: Array) -> str:
        name = f"{role}_{k}"
        dtype = arrays.SLOT[arrays.dtype_name(x)] if role.endswith("gradient") else arrays.dtype_name(x)
        self.optimizer.engine.state.add(name, arrays.zeros_like(x, dtype), "zeros", late=True)
        if role != "scale":  # AdamW's state is in these units
            self._own.append(name)
        return name

    # Its arrays

    def get(self, role: str) -> list[Array]:
        """Live arrays, one per variable: ``scale``; in these units, if there are any, ``x``, ``gradient`` and AdamW's
        own (``momentum``, ...); and in the user's, ``best`` and ``best_gradient``.
        """
        if role == "x" and self.mutable:
            return self._variables
        return [own[key] for own, key in self._places(role)]

    def put(self, role: str, values: Sequence[Array]) -> None:
        """Write such arrays, or replace them where they are immutable."""
        if self.mutable:
            arrays.write_all(list(zip(self.get(role), values, strict=True)))
            return
        for (own, key), value in zip(self._places(role), values, strict=True):
            own[key] = arrays.like(own[key], value)

    def _places(self, role: str) -> list[tuple[dict[str, Array], str]]:
        state = self.optimizer.engine.state
        if role in self._arrays:
            return [(state.added[True], name) for name in self._arrays[role]]
        return [(slots, role) for slots in state.slots]

    def points(self) -> list[Array]:
        """x in the user's units."""
        x = self.get("x")
        if not self.is_scaled:
            return x
        points = multiplied(x, self.get("scale"))
        if self.bounds is None or self._inner_bounds is None:
            return points
        return onto_bounds(points, x, self.bounds, self._inner_bounds)

    @property
    def inner_bounds(self) -> Bounds | None:
        """The bounds of what the optimizer moves."""
        return self._inner_bounds

    def renew_bounds(self) -> None:
        """Bring the bounds of what the optimizer moves into the present units."""
        if not self.is_scaled or self.bounds is None:
            return
        scale = self.get("scale")
        pairs = [divided(pair, [unit] * 2) for pair, unit in zip(self.bounds, scale, strict=True)]
        if self._inner_bounds is None or not self.mutable:
            self._inner_bounds = [(lower, upper) for lower, upper in pairs]
        else:  # in place, since the compiled loop knows where they are
            for old, new in zip(self._inner_bounds, pairs, strict=True):
                arrays.write_all(list(zip(old, new, strict=True)))

    @property
    def roles(self) -> set[str]:
        """Which arrays it has."""
        return {"x", *self._arrays, *(self.optimizer.engine.state.slots or [{}])[0]}

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
        self.renew_bounds()  # of a run that was restored
        if not self.counts[stopping.EVALUATED]:
            self.evaluate()
        self.decide()

    def left_in_stage(self) -> int:
        """Iterations until a stage of the automatic learning rate ends."""
        return sys.maxsize if self.stages is None else self.stages.left(self.iteration)

    def begin_stage(self) -> None:
        """Where a stage of the automatic learning rate begins: go on from the best point, in units of its size."""
        if self.stages is not None and self.stages.begins_at(self.iteration) and self._has_best():
            self._go_on_from_best(scale_of_stage(self.get("best"), self.problem.leaves))

    def recover(self) -> None:
        """After NaN or infinity, where it chooses its units: go on from the best point, in smaller ones."""
        if not self.chooses_units or self.reason != stopping.NONFINITE or not self._has_best():
            return
        scale = [unit / 10 for unit in self.get("scale")]
        unit, size = self.largest_of(scale, self.get("best"))
        if unit > SMALLEST * max(1.0, size):  # else smaller ones would not help
            self._go_on_from_best(scale)
            self.decide()

    def largest_of(self, *groups: Sequence[Array]) -> list[float]:
        """The largest magnitude in each group of arrays."""
        return [largest(leaves) for leaves in groups]

    def _has_best(self) -> bool:
        return "best" in self._arrays and math.isfinite(self.values[stopping.BEST])

    def _go_on_from_best(self, scale: list[Array]) -> None:
        """Move to the best point, as if its gradient had always been the same."""
        self.put("scale", scale)
        self.renew_bounds()
        self.go_to_best()
        gradients = self.get("gradient")
        squares = [g * g for g in gradients]
        values = {"momentum": gradients, "velocity": squares, "velocity_hat": squares, "average": self.get("x")}
        for role in self.roles & values.keys():
            self.put(role, values[role])

    def go_to_best(self) -> Evaluation:
        """Move to the best point, and return what was found there."""
        best, gradients = self.get("best"), self.get("best_gradient")
        self.put("x", divided(best, self.get("scale")) if self.is_scaled else best)
        scaled = self.in_units(gradients)
        self.put("gradient", [cast(g, like) for g, like in zip(scaled, self.get("gradient"), strict=True)])
        self.values[[stopping.FUN, stopping.PREVIOUS]] = self.values[stopping.BEST]
        self.values[stopping.GRADIENT_NORM] = self._gradient_norm(best, gradients)
        copies = [arrays.like(g, g) for g in gradients]
        return Evaluation(float(self.values[stopping.BEST]), copies, 0)

    def in_units(self, gradients: list[Array]) -> list[Array]:
        """Gradients with respect to what the optimizer moves."""
        return multiplied(gradients, self.get("scale")) if self.is_scaled else gradients

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
        before = [arrays.like(x, x) for x in self.get("x")]
        updates = self.optimizer.iterations
        self.counts[stopping.EVALUATED] = 0
        gradients = self.get("gradient")
        if self.mutable:
            self.optimizer.apply(gradients)
        else:
            self._apply_statelessly(gradients)
        if self._inner_bounds is not None:
            self.put("x", within(self.get("x"), self._inner_bounds))
        self.measure_step(before)
        self.counts[stopping.NIT] += 1
        self.rate[0] = self.optimizer.last_step.learning_rate  # type: ignore[union-attr]
        self.counts[stopping.UPDATED] = self.optimizer.iterations > updates and self.rate[0] > 0

    def measure_step(self, before: Sequence[Array]) -> None:
        """Note how far x has moved from where it was, in the user's units."""
        moves = [difference(*pair) for pair in zip(self.get("x"), before, strict=True)]
        self.values[stopping.STEP_NORM] = largest(multiplied(moves, self.get("scale")) if self.is_scaled else moves)
        if self.limits[stopping.XTOL] >= 0:  # which nothing else needs
            self.values[stopping.SIZE] = largest(self.points())

    def _apply_statelessly(self, gradients: list[Array]) -> None:
        optimizer = self.optimizer
        before, rate = optimizer.iterations, optimizer.learning_rate
        new, state = optimizer.stateless_apply(optimizer.variables, gradients, self.get("x"))
        optimizer.set_weights(state)
        self.put("x", new)
        optimizer.engine.record.last = None, optimizer.iterations > before, rate, ()

    def evaluate(self) -> None:
        """Value and gradient where the last update has led, and what they mean for the tolerances."""
        self.take(self.objective.evaluate(self.points(), self.nit))

    def take(self, evaluation: Evaluation) -> None:
        """Note what was found where x is."""
        points, likes = self.points(), self.get("gradient")
        gradients = [cast(g, like) for g, like in zip(evaluation.gradients, likes, strict=True)]
        self.measure(evaluation, points, gradients)
        stopping.note(self.values, self.counts, self.limits)
        self.counts[stopping.EVALUATED] = 1
        if "best" in self._arrays and self.counts[stopping.BEST_AT] == self.nit:
            self.put("best", points)
            self.put("best_gradient", gradients)
        self.history.extend(np.array([[self.nit, *self.values[:2], self.rate[0], self.values[2], self.elapsed]]))

    def measure(self, evaluation: Evaluation, points: list[Array], gradients: list[Array]) -> None:
        """Note the gradient and the numbers that decide how the run goes on."""
        self.put("gradient", self.in_units(gradients))
        self.values[stopping.FUN] = evaluation.value
        self.values[stopping.GRADIENT_NORM] = self._gradient_norm(points, gradients)
        self.counts[stopping.NFEV] += evaluation.calls
        self.counts[stopping.NJEV] += 1
        self.counts[stopping.COST] = evaluation.calls

    def _gradient_norm(self, points: list[Array], gradients: list[Array]) -> float:
        return largest(gradients if self.bounds is None else inward(points, gradients, self.bounds))

    # What comes out

    def end(self) -> None:
        """What is to be done once, when it has stopped."""

    def is_moving(self) -> bool:
        """Whether the last steps went in one direction."""
        return stopping.is_one_way(*stopping.sums_of(self.optimizer.engine.state.slots), self.optimizer)

    def result(self) -> Any:
        """The result as it stands."""
        best = self._returns_best and self._has_best()
        status, message = stopping.STATUS.get(self.reason, (-1, "Still going on."))
        if status in (1, 2) and self.is_moving():
            if self.chooses_units:
                hint = "The gradients still point one way: raise maxiter, or x_scale if x has far to go."
            else:
                hint = "x was still moving by about learning_rate at each step: raise learning_rate or maxiter."
            message = f"{message} {hint}"
        fields = {
            "message": message + self.remark,
            "success": status == 0,
            "status": status,
            "fun": float(self.values[stopping.BEST if best else stopping.FUN]),
            "x": self._out("best" if best else "x"),
            "nit": self.nit,
            "jac": self._gradient("best_gradient" if best else "gradient"),
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
        """Copies, in the user's units."""
        found = self.points() if role == "x" else self.get(role)
        return rebuild(self.problem.container, [arrays.like(array, array) for array in found])

    def _gradient(self, role: str) -> Container:
        """Copies of gradients, in the user's units; NaN where they are not known."""
        found = self.get(role)
        if role == "gradient" and self.is_scaled:
            found = divided(found, self.get("scale"))
        copies, fixed = [arrays.like(g, g) for g in found], self.objective.fixed()
        if fixed is not None:
            copies = [np.where(where, np.asarray(np.nan, g.dtype), g) for g, where in zip(copies, fixed, strict=True)]
        return rebuild(self.problem.container, copies)

    def _state(self) -> dict[str, Array]:
        """Copies of AdamW's own arrays, by name."""
        live = {name: array for name, array in self.optimizer.state.items() if name not in self._own}
        return {name: np.array(a) if isinstance(a, np.ndarray) else arrays.like(a, a) for name, a in live.items()}

    def _average(self) -> Container:
        found = self.optimizer.averages
        found = multiplied(found, self.get("scale")) if self.is_scaled else found
        average = [arrays.like(x, a) for x, a in zip(self.get("x"), found, strict=True)]
        return rebuild(self.problem.container, average if self.bounds is None else within(average, self.bounds))

    # Going on

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Start with AdamW's state of an earlier result, in its units."""
        take_state(self.optimizer, state)
        if self.is_scaled:
            self.put("x", divided(self.problem.leaves, self.get("scale")))

    # Saving

    def stamp(self) -> None:
        """Note the time, before the state is saved."""
        self.clock[0], self.started = self.elapsed, time.perf_counter()

    def sign(self) -> None:
        """Note the checksums of where it starts, before anything moves."""
        bounds = [bound for pair in self.bounds or [] for bound in pair]
        self.origin[:] = [checksum(self.problem.leaves), checksum(bounds)]
