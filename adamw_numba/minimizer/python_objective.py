"""An objective in Python as a C function, so that the compiled loop can call it: all around it is compiled then."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import stopping
from .loop_kernel import PAUSED, RAISED

_SECONDS = 0.05  # after so long the loop comes back to Python, for signals, progress and limits of time


class PythonObjective:
    """The objective of one run, for the compiled loop.

    Parameters
    ----------
    run : Run
    deadline : float
        Seconds of the run after which the loop is to stop.

    Attributes
    ----------
    address : int
        Of a C function of three addresses: the elements, the gradient, and a word that says how the call ended.
    error : BaseException or None
        What the objective has raised.
    """

    def __init__(self, run: Any, deadline: float) -> None:
        self.run, self.deadline = run, deadline
        self.error: BaseException | None = None
        self._until = 0.0
        self._word: Any = np.zeros(1, np.int64)
        self._views: dict[int, Any] = {}
        x = run.get("x")[0]
        self._shape, self._dtype = x.shape, x.dtype
        make: Any = ctypes.CFUNCTYPE
        self._function = make(ctypes.c_double, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._evaluate)
        self.address = int(ctypes.cast(self._function, ctypes.c_void_p).value or 0)

    @contextmanager
    def called(self, word: Any) -> Iterator[None]:
        """In which compiled code calls it; what has been raised meanwhile is raised at the end."""
        self._word, self.error = word, None
        self._until = time.perf_counter() + min(_SECONDS, max(self.deadline - self.run.elapsed, 0.0))
        hook, sys.unraisablehook = sys.unraisablehook, self._note_unraisable
        try:
            yield
        finally:
            sys.unraisablehook = hook

    def _evaluate(self, x: int, gradient: int, word: int) -> float:
        try:
            return self._value(self._view(x), self._view(gradient))
        except BaseException as error:  # which compiled code cannot pass on
            self.error = error
            self._word[0] = RAISED
            return np.nan

    def _value(self, x: Any, gradient: Any) -> float:
        run = self.run
        evaluation = run.objective.evaluate([x], run.nit)
        (found,) = evaluation.gradients
        if found.dtype == gradient.dtype:
            gradient[...] = found
        else:
            with np.errstate(all="ignore"):
                gradient[...] = found.astype(gradient.dtype)
        run.counts[stopping.NFEV] += evaluation.calls - 1  # one is counted by the loop
        run.counts[stopping.COST] = evaluation.calls
        if time.perf_counter() > self._until:
            self._word[0] = PAUSED
        return float(evaluation.value)

    def _view(self, address: int) -> Any:
        """The array of the loop that lies there."""
        if address not in self._views:
            count = int(np.prod(self._shape))
            memory = (ctypes.c_char * (count * self._dtype.itemsize)).from_address(address)
            self._views[address] = np.frombuffer(memory, self._dtype).reshape(self._shape)
        return self._views[address]

    def _note_unraisable(self, unraisable: Any) -> None:
        """An interrupt may come where `_evaluate` has begun and cannot catch it yet."""
        self.error = unraisable.exc_value
        self._word[0] = RAISED
