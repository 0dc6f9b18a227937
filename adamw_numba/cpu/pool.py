"""Helpers: Python threads that take parts of a job of compiled code, without the interpreter's lock.

Whoever runs a job begins at once and waits for nobody else to begin. In a region of OpenMP, or of Numba's own pool, it
would wait for all threads to arrive, which takes milliseconds where another library (a BLAS after a matrix product,
say) has threads that spin on the same cores. Nor do these threads mind a fork, or several callers at once.

To wake a helper takes as long as a large step. Once awake it stands by for a while, looking out for the next job: where
steps follow each other closely, it is there at once.
"""

import ctypes
import math
import operator
import os
import sys
import threading
import time
from collections import deque
from itertools import starmap
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

from . import jobs

MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
MOST_PARTS = 8 * MOST_THREADS
HELPED_FROM = 2**15  # elements
LEAST = 2**14  # elements for a thread
WOKEN_FROM = 2**19  # elements: to wake a helper takes as long as half as many do
PART = 2**15  # elements, at least, from there on
KEEN, POLITE = 5e-5, 1500  # seconds, then looks (half a millisecond, if no other thread wants to run), to stand by
CLOSELY = 4e-4  # seconds between jobs that follow each other closely
LONGEST = 1e-9  # seconds that the last job took, for each element
MOST_PASSED_OVER = 1000  # small jobs that do not call, after others have called in vain
TRIES, LOOKS = 3, 200  # to find out how long a look takes
_run = deque[Any](maxlen=0).extend  # makes calls with no bytecode, and so no interrupt, between them


def _address_of_give_way() -> int:
    """The system's function by which a thread lets others run."""
    library: Any = ctypes.CDLL("kernel32" if os.name == "nt" else None)
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_GIVE_WAY = _address_of_give_way()


class _Helpers:
    """The threads of this process, started when first needed; a forked child starts its own."""

    def __init__(self) -> None:
        self.bench = np.zeros(jobs.BENCH_WORDS, np.int64)
        self.address: int = self.bench.ctypes.data
        self.forget()

    def forget(self) -> None:
        """Begin anew: in a forked child the threads do not exist."""
        self.bench[:] = 0
        self.queue: SimpleQueue[None] = SimpleQueue()
        self.started, self.most, self.looks = 0, sys.maxsize, 0
        self.last, self.pass_over, self.in_vain = 0.0, 0, 0
        self.lock = threading.RLock()  # a signal may come while a helper is started, and its handler take a step

    def call(self, count: int, elements: int) -> None:
        """Have so many helpers stand by for a job that comes now, if it is large or follows closely on another.

        Where small jobs turn out not to, they call less and less often.
        """
        now = time.perf_counter()
        soon, self.last = now - self.last < CLOSELY + elements * LONGEST, now
        count = min(count, self.most)
        if count <= self.bench.item(jobs.HELPERS):
            self.pass_over = self.in_vain = 0
        elif elements >= WOKEN_FROM:
            self._wake(count)
        elif soon and self.pass_over > 0:
            self.pass_over -= 1
        elif soon:
            self.pass_over = self.in_vain = min(2 * self.in_vain + 1, MOST_PASSED_OVER)
            self._wake(count)

    def _wake(self, count: int) -> None:
        self.looks = self.looks or _looks()
        with self.lock:
            while self.started < min(count, self.most):
                try:
                    threading.Thread(target=_help, args=(self,), name="adamw_numba", daemon=True).start()
                except RuntimeError:  # the system, or an interpreter that ends, allows no more of them
                    self.most = self.started
                else:
                    self.started += 1
        missing = min(count, self.most) - self.bench.item(jobs.HELPERS)
        _run(starmap(operator.call, [(jobs.count_helper, self.address, 1), (self.queue.put, None)] * missing))


def _looks() -> int:
    """How often a helper can look out for jobs while it is keen."""
    nobody, took = np.zeros(jobs.BENCH_WORDS, np.int64), []
    for _ in range(TRIES):
        start = time.perf_counter()
        jobs.stand_by(nobody.ctypes.data, LOOKS, 0, 0)
        took.append(time.perf_counter() - start)
    return math.ceil(LOOKS * KEEN / min(took))


def _help(helpers: _Helpers) -> None:
    queue = helpers.queue
    while True:
        queue.get()
        jobs.stand_by(helpers.address, helpers.looks, POLITE, _GIVE_WAY)


_HELPERS = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELPERS.forget)

Call = tuple[Any, ...]


def job_call(kernel: int, block: int, elements: int, requested: int | None, parts: int | None = None) -> Call:
    """What to call to run a kernel over so many elements, on at most `requested` threads (None: as many as Numba's).

    `parts` is into how many parts to cut the work, if elements shall not decide.
    """
    if parts is None and elements >= WOKEN_FROM:
        parts = min(elements // PART, MOST_PARTS)
    elif parts is None:  # one for each thread, the same at every step: each core has its own in its cache
        parts = elements // LEAST if elements >= HELPED_FROM else 1
        requested = parts = min(parts, MOST_THREADS, requested or MOST_THREADS)
    count = min(parts, MOST_THREADS, requested or MOST_THREADS)
    if count < 2:
        return jobs.run_serial, kernel, block
    return jobs.run_job, kernel, block, parts, count - 1, _HELPERS.address, _GIVE_WAY


def helpers_of(call: Call) -> int:
    """How many helpers a call can do with."""
    return 0 if call[0] is jobs.run_serial else call[4]


call_helpers = _HELPERS.call
