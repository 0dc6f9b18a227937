"""Helpers: every part of a job is done once, by no more threads than may; and they are called where that pays."""

import threading
import time
from queue import SimpleQueue

import numpy as np
import pytest
from numba import carray, cfunc, types

from adamw_numba.arrays.compiled import pointer
from adamw_numba.cpu import jobs
from adamw_numba.cpu import pool as threads
from adamw_numba.cpu.pool import CLOSELY, GIVE_WAY, MOST_PASSED_OVER, WOKEN_FROM, Pool

SMALL = 2**16


@cfunc(types.void(types.intp, types.intp, types.intp))
def count_parts(block, part, parts):
    """Count how often each part is done, and, in the last entry, how many parts there are said to be."""
    counts = carray(pointer(block, np.int64(0)), 65)
    for _ in range(2000 if part % 8 == 3 else 20):  # long enough to be left behind
        jobs.pause()
    counts[part] += 1
    counts[64] = parts


@pytest.fixture
def helpers():
    """Threads of their own, which are let go at the end."""
    made = Pool()
    yield made
    for _ in range(made.started):
        made.queue.put(None)


class Held(SimpleQueue):
    """Calls that reach no helper before they are let through: until then, those called stay called."""

    def __init__(self):
        self.calls = []

    def put(self, call):
        self.calls.append(call)

    def let_through(self):
        while self.calls:
            super().put(self.calls.pop())


def counted(helpers, parts, seats):
    counts = np.zeros(65, np.int64)
    jobs.run_job(count_parts.address, counts.ctypes.data, parts, seats, helpers.address, GIVE_WAY)
    return counts


def test_each_part_once(helpers):
    """Several callers, more helpers than cores, jobs that follow each other at once, and late helpers."""
    wrong, random = [], np.random.default_rng(0)
    cuts = random.integers(2, 64, (4, 2000)).tolist()

    def call(mine):
        for number, parts in enumerate(mine):
            if number % 50 == 0:
                helpers.call(3, WOKEN_FROM)
            counts = counted(helpers, parts, number % 4)
            if counts[:64].tolist() != [1] * parts + [0] * (64 - parts) or counts[64] != parts:
                wrong.append((parts, counts.tolist()))

    callers = [threading.Thread(target=call, args=(mine,)) for mine in cuts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    assert helpers.started == 3


def test_a_full_board(helpers):
    """More jobs at once than there are rows: the last one is done alone, as one part."""
    rows = helpers.board[: jobs.HELPERS].reshape(jobs.JOBS, jobs.JOB_WORDS)
    rows[:, jobs.OWNED] = 1
    assert counted(helpers, 5, 2).nonzero()[0].tolist() == [0, 64]
    rows[3, jobs.OWNED] = 0
    counts = counted(helpers, 5, 2)
    assert counts[:5].tolist() == [1] * 5
    assert rows[:, jobs.OWNED].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_seats(helpers):
    """A helper without a seat does nothing; one with a seat takes what is left, and counts itself out in the end."""
    counts = np.zeros(65, np.int64)
    job = helpers.board[: jobs.JOB_WORDS]
    job[[jobs.OWNED, jobs.SEATS, jobs.KERNEL, jobs.BLOCK, jobs.PARTS, jobs.LEFT, jobs.DONE]] = [
        1, 0, count_parts.address, counts.ctypes.data, 7, 4, 0,
    ]  # fmt: skip
    jobs.count_helper(helpers.address, 2)
    jobs.stand_by(helpers.address, 2, 2, GIVE_WAY)
    assert not counts.any()
    job[jobs.SEATS] = 1
    jobs.stand_by(helpers.address, 2, 2, GIVE_WAY)
    assert counts[:7].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert helpers.board[jobs.HELPERS] == 0
    assert job[jobs.DONE] == 4


def test_helpers_stand_by_for_a_while(helpers):
    helpers.queue = Held()
    helpers.call(2, WOKEN_FROM)
    assert helpers.board[jobs.HELPERS] == 2  # from the moment that they are called
    helpers.queue.let_through()
    while helpers.board[jobs.HELPERS]:
        time.sleep(CLOSELY)
    helpers.queue.put(None)
    helpers.queue.put(None)
    helpers.queue.let_through()


# Steps of (seconds since the last job, elements, helpers found standing), and at which of them helpers are called.
LARGE = (1.0, WOKEN_FROM, 0)
CLOSE, FAR = (CLOSELY / 2, SMALL, 0), (CLOSELY + SMALL * 1.1e-9, SMALL, 0)
HELPED = (CLOSELY / 2, SMALL, 1)
CALLS = {
    "large jobs": ([LARGE] * 3, [0, 1, 2]),
    "small ones far apart": ([FAR] * 9, []),
    "small ones, close": ([FAR, CLOSE, *[HELPED] * 5], [1]),
    "small ones, in vain": ([CLOSE] * 30, [0, 2, 6, 14]),
    "close again": ([CLOSE] * 3 + [HELPED] + [CLOSE] * 3, [0, 2, 4, 6]),
    "far ones count for nothing": ([CLOSE, FAR, FAR, CLOSE, CLOSE], [0, 4]),
    "a large one among them": ([CLOSE, LARGE, CLOSE, CLOSE], [0, 1, 3]),
}


@pytest.mark.parametrize("case", CALLS)
def test_when_helpers_are_called(case, monkeypatch):
    steps, expected = CALLS[case]
    made, clock, called = Pool(), [100.0], []
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(made, "wake", lambda count: called.append(True))
    made.last = clock[0]
    numbers = []
    for number, (seconds, elements, standing) in enumerate(steps):
        clock[0] += seconds
        made.board[jobs.HELPERS] = standing
        made.call(1, elements)
        numbers += [number] * len(called)
        called.clear()
    assert numbers == expected


def test_calls_in_vain_become_rare():
    made, called = Pool(), []
    made.wake = lambda count: called.append(1)
    for _ in range(20_000):
        made.last = time.perf_counter()
        made.call(1, SMALL)
    assert len(called) <= 20_000 // MOST_PASSED_OVER + 11


@pytest.mark.parametrize("given", [0, 1])
def test_no_more_threads(given, helpers, monkeypatch):
    """Where the system gives fewer, those there are help, and nobody asks again; with none, a job is done alone."""
    asked, start = [], threading.Thread.start

    def limited(thread):
        asked.append(thread)
        if len(asked) > given:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    helpers.queue = Held()
    for _ in range(3):
        helpers.call(2, WOKEN_FROM)
        assert helpers.board[jobs.HELPERS] == given
        assert counted(helpers, 3, 2)[:4].tolist() == [1, 1, 1, 0]
    assert helpers.started == given
    assert len(asked) == given + 1
    helpers.queue.let_through()
