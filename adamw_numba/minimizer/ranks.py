"""One minimization by several ranks, each with its part of the unknowns: all decide from the same rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from itertools import compress
from operator import add
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..ranks import words as rows
from ..ranks.agreement import Agreement
from ..ranks.protocol import Rows
from . import stopping
from .differentiation import DIFFERENCES
from .driver import Callback, drive, prepare, wants_to_stop
from .evaluation import Evaluation
from .measures import checksum
from .options import Settings
from .run import Run
from .signals import held_interrupts

FIRST, SECOND = rows.VALUE, rows.GRADIENT  # two numbers of decisions that are about others
# What each rank has of its own, or shows or keeps for itself.
_OWN = (
    "state", "x_scale", "workers", "finite_diff_rel_step", "eps", "disp", "progress", "history", "return_all",
    "compiled", "hyper",
)  # fmt: skip


class RunOnRanks(Run):
    """The part of a minimization that one rank has.

    Whatever the ranks decide by is a word of a row, of which one is gathered at each evaluation: sums in the order of
    the ranks, and maxima.

    Parameters
    ----------
    agreement : Agreement
    arguments : dict
        What has to be the same on all ranks. ``value`` says whether the value of the objective is the sum of what all
        ranks find, or the same on all.
    callback : callable or None
    *described
        As of `Run`.

    Attributes
    ----------
    asks : bool
        Whether any rank has a callback.
    """

    def __init__(
        self, agreement: Agreement, arguments: dict[str, Any], callback: Callback | None, *described: Any
    ) -> None:
        self.agreement, self._adds, self._callback = agreement, arguments["value"] == "sum", callback
        self.asks = bool(agreement.settle(arguments, {rows.STOPS: callback is not None})[:, rows.STOPS].any())
        self._seconds = 0.0  # since the start, of the slowest rank up to the last row
        self._gradient_at_best = np.nan
        self._is_moving = False
        super().__init__(*described, together=agreement)
        if not self.mutable:
            _check_stateless(self.optimizer, self.problem.leaves[0])

    # One iteration

    @property
    def elapsed(self) -> float:
        """Seconds up to the last row, of the slowest rank."""
        return self._seconds

    def measure(self, evaluation: Evaluation, points: list[Array], gradients: list[Array]) -> None:
        """Note the gradient, and the numbers of all ranks that decide how the run goes on."""
        super().measure(evaluation, points, gradients)
        known = [stopping.GRADIENT_NORM, stopping.STEP_NORM, stopping.SIZE]
        gradient, move, size = self.values[known].tolist()
        words = {
            rows.VALUE: evaluation.value,
            rows.GRADIENT: gradient,
            rows.MOVE: move,
            rows.SIZE: size,
            rows.SHARED_X: self._checksum(points),
            rows.SHARED_GRADIENT: self._checksum(gradients),
        }
        same = {} if self._adds else {rows.VALUE: "`value` is 'same' and the values of `fun` differ"}
        found = self._decide("evaluate", words, same)
        values = found[:, rows.VALUE].tolist()
        self.values[stopping.FUN] = reduce(add, values) if self._adds else values[0]
        self.values[known] = found[:, [rows.GRADIENT, rows.MOVE, rows.SIZE]].max(axis=0)

    def take(self, evaluation: Evaluation) -> None:
        """Note what was found where x is."""
        super().take(evaluation)
        if self.counts[stopping.BEST_AT] == self.nit:
            self._gradient_at_best = float(self.values[stopping.GRADIENT_NORM])

    def go_to_best(self) -> Evaluation:
        """Move to the best point, and return what was found there."""
        evaluation = super().go_to_best()
        self.values[stopping.GRADIENT_NORM] = self._gradient_at_best  # of all ranks
        return evaluation

    def largest_of(self, *groups: Sequence[Array]) -> list[float]:
        """The largest magnitude in each of two groups of arrays, of all ranks."""
        words = dict(zip((FIRST, SECOND), super().largest_of(*groups), strict=True))
        found: list[float] = self._decide("recover", words)[:, [FIRST, SECOND]].max(axis=0).tolist()
        return found

    def ask(self) -> bool:
        """Whether the callback of any rank wants to stop."""
        wants = self._callback is not None and wants_to_stop(self._callback, self)
        return bool(self._decide("callback", {rows.STOPS: wants})[:, rows.STOPS].any())

    # What comes out

    def end(self) -> None:
        """Agree on what the message says; from then on, what is raised concerns this rank alone."""
        status, _ = stopping.STATUS[self.reason]
        slots = self.optimizer.engine.state.slots
        counted = compress(slots, self.agreement.counts) if status in (1, 2) else ()
        found = self._decide("end", dict(zip((FIRST, SECOND), stopping.sums_of(counted), strict=True)))
        square, total = (reduce(add, found[:, word].tolist()) for word in (FIRST, SECOND))
        self._is_moving = stopping.is_one_way(square, total, self.optimizer)

    def is_moving(self) -> bool:
        """Whether the last steps went in one direction, on all ranks together; not known before the end."""
        return self._is_moving

    def _decide(self, call: str, words: dict[int, Any], must_agree: dict[int, str] | None = None) -> Rows:
        words[rows.SECONDS] = time.perf_counter() - self.started
        found = self.agreement.decide(call, self.optimizer.engine, words, must_agree or {})
        self._seconds = float(found[:, rows.SECONDS].max())
        return found

    def _checksum(self, leaves: Sequence[Array]) -> float:
        """Of replicated arrays; NaN where they are not finite, since there are many NaN."""
        shared = [np.asarray(arrays.to_numpy(leaves[i])) for i in self.agreement.shared]
        if not all(np.isfinite(array).all() for array in shared):
            return np.nan
        return checksum([array + 0 for array in shared])  # without the sign of a zero


def minimize_on_ranks(
    comm: Any,
    read: Callable[[], tuple[Settings, Callback | None]],
    value: Any,
    replicated: Any,
    problem: Sequence[Any],
) -> tuple[Any, bool]:
    """The result on this rank, and whether a summary is to be printed.

    Parameters
    ----------
    comm : communicator
    read : callable
        Reads the options and the callback.
    value : {"sum", "same"}
    replicated : list of str
    problem : tuple
        ``(fun, x0, args, jac, bounds)``.
    """
    agreement = Agreement(comm)
    with _connected(agreement):
        names = agreement.share(replicated)
        settings, callback = read()
        fun, x0, args, jac, bounds = problem
        _refuse(settings, jac)
        arguments = _described(settings) | {"value": value, "replicated": names}
        is_first = agreement.ranks.rank == 0
        settings["compiled"] = False  # which knows of one process
        settings["progress"] = settings["progress"] if is_first or callable(settings["progress"]) else False
        run: Any = prepare(fun, x0, args, jac, bounds, settings, partial(RunOnRanks, agreement, arguments, callback))
        result = drive(run, settings, RunOnRanks.ask if run.asks else None)  # type: ignore[arg-type]
    return result, bool(settings["disp"]) and is_first


@contextmanager
def _connected(agreement: Agreement) -> Iterator[None]:
    with held_interrupts(agreement), agreement.looping("evaluate"):
        yield


def _refuse(settings: Settings, jac: Any) -> None:
    """What one process alone can do."""
    for key, why in (("checkpoint", "a run of several cannot be saved"), ("polish", "L-BFGS-B knows of one process")):
        if settings[key] is not None:
            raise ValueError(f"`{key}` is {brief(settings[key])} and `comm` is given; expected None: {why} yet")
    if jac is None or jac is False or (isinstance(jac, str) and jac in DIFFERENCES):
        raise ValueError(
            f"`jac` is {brief(jac)} and `comm` is given; expected True, a function, 'torch' or 'jax': finite "
            "differences know of one process"
        )


def _check_stateless(optimizer: Any, leaf: Array) -> None:
    """Refuse what needs the norm of all gradients where a step is a pure function, which knows of one process."""
    asked = {key: getattr(optimizer, key) for key in ("clipnorm", "global_clipnorm")}
    asked["nonfinite"] = optimizer.nonfinite if optimizer.nonfinite != "propagate" else None
    for key, given in asked.items():
        if given is not None:
            raise ValueError(
                f"`{key}` is {brief(given)}, `comm` is given, and x0 is an array of {arrays.library_name(leaf)}, which "
                "is immutable; expected NumPy arrays or tensors of torch"
            )


def _described(settings: Settings) -> dict[str, Any]:
    """What has to be the same on all ranks, as JSON takes it."""
    shared = {key: value for key, value in settings["hyper"].items() if key != "threads"}
    shared |= {key: value for key, value in settings.items() if key not in _OWN}
    shared["batches"] = settings["batches"] is not None
    return {key: _plain(value) for key, value in shared.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return float(value) if isinstance(value, np.number) else f"a {type(value).__name__}"
