"""Helpers: Python threads that take parts of a job of compiled code, without the interpreter's lock.

Whoever runs a job begins at once and waits for nobody else to begin. In a region of OpenMP, or of Numba's own pool, it
would wait for all threads to arrive, which takes milliseconds where another library (a BLAS after a matrix product,
say) has threads that spin on the same cores. Nor do these threads mind a fork, or several callers at once.
"""

import ctypes
import os
import threading
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

from . import cpu

MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
MOST_PARTS = 8 * MOST_THREADS
SERIAL_BELOW = 2**19  # elements: to wake a helper takes as long as half as many do
PART = 2**15  # elements, at least
Job = np.ndarray[tuple[int], np.dtype[np.int64]]


def _address_of_give_way() -> int:
    """The system's function by which a thread lets others run."""
    library: Any = ctypes.CDLL("kernel32" if os.name == "nt" else None)
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _Helpers:
    """The threads of this process, started when first needed; a forked child starts its own."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: in a forked child the threads do not exist."""
        self.queue: SimpleQueue[Job] = SimpleQueue()
        self.count = 0
        self.lock = threading.Lock()

    def ensure(self, count: int) -> "SimpleQueue[Job]":
        """The queue that so many helpers, or more, take jobs from."""
        if self.count < count:
            with self.lock:
                while self.count < count:
                    threading.Thread(target=_help, args=(self.queue,), name="adamw_numba", daemon=True).start()
                    self.count += 1
        return self.queue


def _help(queue: "SimpleQueue[Job]") -> None:
    while True:
        cpu.take_parts(queue.get())


_GIVE_WAY = _address_of_give_way()
# The first call with an array asks Python for its type, where an interrupt could come in: not in a step, but here.
cpu.take_parts(np.zeros(5, np.int64))
cpu.run_job(np.zeros(5, np.int64), _GIVE_WAY)
_HELPERS = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELPERS.forget)


def job_calls(kernel: int, block: int, elements: int, requested: int | None) -> list[tuple[object, ...]]:
    """What to call to run a kernel over so many elements, on at most `requested` threads (None: as many as Numba's)."""
    parts = min(elements // PART, MOST_PARTS) if elements >= SERIAL_BELOW else 1
    threads = min(parts, MOST_THREADS, requested or MOST_THREADS)
    if threads < 2:
        return [(cpu.run_serial, kernel, block)]
    queue = _HELPERS.ensure(threads - 1)
    job = np.array([kernel, block, parts, 0, 0], np.int64)
    return [*[(queue.put, job)] * (threads - 1), (cpu.run_job, job, _GIVE_WAY)]
