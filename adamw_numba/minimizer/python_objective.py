"""An objective in Python as a C function, so that the compiled loop can call it: all around it is compiled then."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import arrays
from . import stopping
from .loop_kernel import PAUSED, RAISED
from .parts import Parts, as_host

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
        self._leaves = leaves = run.get("x")
        self._parts, self._dtype = Parts(leaves), np.dtype(arrays.dtype_name(leaves[0]))
        self._views: dict[int, list[Any]] = {}
        self._given: dict[int, list[Any]] = {}
        make: Any = ctypes.CFUNCTYPE
        self._function = make(ctypes.c_double, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._evaluate)
        # Not `ctypes.cast`, which makes the function refer to itself.
        self.address = int(ctypes.c_void_p.from_buffer(self._function).value or 0)

    @contextmanager
    def called(self, word: Any) -> Iterator[None]:
        """In which compiled code calls it; what has been raised meanwhile is raised at the end."""
        self._word, self.error = word, None
        self._until = time.perf_counter() + min(_SECONDS, max(self.deadline - self.run.elapsed, 0.0))
        _HOOK.add(self)
        try:
            yield
        finally:
            _HOOK.remove(self)

    def close(self) -> None:
        """Let go of the C function, which refers back to this."""
        self._function = None

    def _evaluate(self, x: int, gradient: int, word: int) -> float:
        try:
            return self._value(x, self._parts_at(gradient))
        except BaseException as error:  # which compiled code cannot pass on
            self.error = error
            self._word[0] = RAISED
            return np.nan

    def _value(self, x: int, gradients: list[Any]) -> float:
        run = self.run
        if self._parts.are_lasting:
            evaluation = run.objective.evaluate(self._points(x), run.nit)
        elif run.objective.is_called_with_copies:
            evaluation = run.objective.evaluate(self._leaves, run.nit, lambda: self._parts.given(self._parts_at(x)))
        else:
            evaluation = run.objective.evaluate(self._parts.given(self._parts_at(x)), run.nit)
        for gradient, each in zip(gradients, evaluation.gradients, strict=True):
            found = as_host(each)
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

    def _points(self, address: int) -> list[Any]:
        """What lies there, as arrays of the user's libraries over the same memory."""
        if address not in self._given:
            self._given[address] = self._parts.given(self._parts_at(address))
        return self._given[address]

    def _parts_at(self, address: int) -> list[Any]:
        """The arrays of the loop that lie there."""
        if address not in self._views:
            memory: Any = (ctypes.c_char * (self._parts.size * self._dtype.itemsize)).from_address(address)
            self._views[address] = self._parts.views(np.frombuffer(memory, self._dtype))
        return self._views[address]

    def note_unraisable(self, error: BaseException) -> None:
        """Note what came where `_evaluate` had begun and could not catch it yet: an interrupt."""
        self.error = error
        self._word[0] = RAISED


class _Hook:
    """What ctypes cannot raise goes to `sys.unraisablehook`: of the objectives that are being called, to them.

    The hook is everybody's. So there is one of ours, as long as anything is being called, for all threads; whatever is
    not about our objectives goes to the hook before.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._called: list[PythonObjective] = []
        self._before: Any = None

    def add(self, objective: PythonObjective) -> None:
        """Take what is about this objective."""
        with self._lock:
            if not self._called:
                self._before, sys.unraisablehook = sys.unraisablehook, self
            self._called = [*self._called, objective]

    def remove(self, objective: PythonObjective) -> None:
        """Take it no more."""
        with self._lock:
            self._called = [each for each in self._called if each is not objective]
            if not self._called and sys.unraisablehook is self:
                sys.unraisablehook = self._before

    def __call__(self, unraisable: Any) -> None:
        function = unraisable.object
        for each in self._called:
            # Newer Pythons only say in the message which function it was.
            is_its = getattr(function, "__self__", None) is each or hex(id(each)) in (unraisable.err_msg or "")
            if is_its:
                each.note_unraisable(unraisable.exc_value)
                return
        self._before(unraisable)


_HOOK = _Hook()
