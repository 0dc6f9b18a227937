"""The pool: Python threads that help with jobs of compiled code (see jobs.py) while they hold no interpreter lock.

Whoever has a job starts on it at once and never waits for a helper to arrive. A parallel region of OpenMP, or of
Numba's own pool, would wait for all of its threads. That takes milliseconds when another library's threads (those of a
BLAS after a matrix product, for example) still spin on the same cores. Unlike such regions, this pool also survives a
fork, and serves several callers at once.

Waking a helper takes as long as a large step. So a helper that has nothing to do watches the board for a while before
it goes back to sleep: in a loop of steps it sees the next job at once.
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
HELPED_FROM = 2**15  # elements of a job that is worth sharing with a helper who watches the board
LEAST = 2**14  # elements for each thread of such a job
WOKEN_FROM = 2**19  # elements of a job for which helpers are woken: waking one takes as long as half as many elements
PART = 2**15  # elements of a part, at least, of such a job
SPIN = 5e-5  # seconds for which an idle helper watches the board without a break
YIELDS = 1500  # looks at the board after that, with other threads let in between: half a millisecond if there are none
CLOSELY = 4e-4  # seconds between jobs that follow each other closely
LONGEST = 1e-9  # seconds that the last job took, for each of its elements
MOST_PASSED_OVER = 1000  # small jobs in a row that call nobody, after calls that were in vain
TRIES, LOOKS = 3, 200  # to measure how long a look takes
# Makes calls with no bytecode between them, where Python would look for signals: an interrupt cannot separate them.
_run = deque[Any](maxlen=0).extend


def _address_of_give_way() -> int:
    """The system's function by which a thread lets others run."""
    library: Any = ctypes.CDLL("kernel32" if os.name == "nt" else None)
    function = library.SwitchToThread if os.name == "nt" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


GIVE_WAY = _address_of_give_way()


class Pool:
    """The helpers of this process. They are started when first needed; a forked child starts its own.

    Attributes
    ----------
    board : array of int64
        Where jobs are posted, and how many helpers watch for them (see jobs.py). It is never freed: a helper may look
        at it at any time.
    address : int
        Of the board.
    started : int
        Threads that exist.
    """

    def __init__(self) -> None:
        self.board = np.zeros(jobs.BOARD_WORDS, np.int64)
        self.address: int = self.board.ctypes.data
        self.forget()

    def forget(self) -> None:
        """Start over: in a forked child the threads do not exist, and a lock may be held by one that does not."""
        self.board[:] = 0
        self.queue: SimpleQueue[None] = SimpleQueue()
        self.started, self.most, self.spins = 0, sys.maxsize, 0
        self.last, self.pass_over, self.in_vain = 0.0, 0, 0
        self.lock = threading.RLock()  # a signal may arrive while a helper is started, and its handler take a step

    def call(self, count: int, elements: int) -> None:
        """Have so many helpers watch the board, if the job that comes now is large or follows another closely.

        Whether small jobs follow each other closely is a guess about the future: a loop of small steps with work of
        the user's between them looks the same at first. So each call that was in vain doubles the number of small jobs
        that pass before the next call.
        """
        now = time.perf_counter()
        soon, self.last = now - self.last < CLOSELY + elements * LONGEST, now
        count = min(count, self.most)
        if count <= self.board.item(jobs.HELPERS):
            self.pass_over = self.in_vain = 0
        elif elements >= WOKEN_FROM:
            self.wake(count)
        elif soon and self.pass_over > 0:
            self.pass_over -= 1
        elif soon:
            self.pass_over = self.in_vain = min(2 * self.in_vain + 1, MOST_PASSED_OVER)
            self.wake(count)

    def wake(self, count: int) -> None:
        """Have so many helpers watch the board."""
        self.spins = self.spins or _spins()
        with self.lock:
            while self.started < min(count, self.most):
                try:
                    threading.Thread(target=_help, args=(self,), name="adamw_numba", daemon=True).start()
                except RuntimeError:  # the system, or an interpreter that is ending, allows no more threads
                    self.most = self.started
                else:
                    self.started += 1
        # A helper counts from the moment it is called, so that the next job does not call it again. It takes itself off
        # the count when it stops watching.
        missing = min(count, self.most) - self.board.item(jobs.HELPERS)
        _run(starmap(operator.call, [(jobs.count_helper, self.address, 1), (self.queue.put, None)] * missing))


def _spins() -> int:
    """How many looks at the board fit into `SPIN` seconds on this processor."""
    nobody, took = np.zeros(jobs.BOARD_WORDS, np.int64), []
    for _ in range(TRIES):
        start = time.perf_counter()
        jobs.stand_by(nobody.ctypes.data, LOOKS, 0, 0)
        took.append(time.perf_counter() - start)
    return math.ceil(LOOKS * SPIN / min(took))


def _help(pool: Pool) -> None:
    queue = pool.queue
    while True:
        queue.get()
        jobs.stand_by(pool.address, pool.spins, YIELDS, GIVE_WAY)


_POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)

Call = tuple[Any, ...]


def job_call(kernel: int, block: int, elements: int, requested: int | None, parts: int | None = None) -> Call:
    """What to call to run a kernel over so many elements.

    Parameters
    ----------
    kernel, block : int
        Addresses.
    elements : int
    requested : int or None
        The most threads to use; None for as many as Numba would.
    parts : int, optional
        Into how many parts to cut the work. By default the number of elements decides.
    """
    if parts is None and elements >= WOKEN_FROM:
        parts = min(elements // PART, MOST_PARTS)  # many: whoever is late, or slow, takes fewer of them
    elif parts is None:  # one for each thread, the same ones at every step: each core finds its own in its cache
        parts = elements // LEAST if elements >= HELPED_FROM else 1
        requested = parts = min(parts, MOST_THREADS, requested or MOST_THREADS)
    count = min(parts, MOST_THREADS, requested or MOST_THREADS)
    if count < 2:
        return jobs.run_serial, kernel, block
    return jobs.run_job, kernel, block, parts, count - 1, _POOL.address, GIVE_WAY


def helpers_of(call: Call) -> int:
    """How many helpers a call can make use of."""
    return 0 if call[0] is jobs.run_serial else call[4]


call_helpers = _POOL.call
