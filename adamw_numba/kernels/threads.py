"""How many threads a loop may use: what Numba's threading layers survive, and what pays."""

import os
import threading

import numba
from numba import get_num_threads, threading_layer  # type: ignore[attr-defined]

SERIAL_BELOW = 32_768  # elements; a parallel region costs as much as some 20,000 of them

MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def thread_count(elements: int, requested: int | None) -> int:
    """Threads for one loop over so many elements.

    One in a forked child, where GNU OpenMP kills the process; under the workqueue layer one unless this is the only
    Python thread, since that layer aborts when two threads meet in it.
    """
    if elements < SERIAL_BELOW or requested == 1 or _forked:
        return 1
    available = int(get_num_threads())
    if threading_layer() == "workqueue" and threading.active_count() > 1:
        return 1
    return available if requested is None else min(available, requested)
