"""Ranks that are forked processes, of which one may be killed: the others notice at once."""

import multiprocessing
import os
import signal
import sys
import traceback

import numpy as np

_FORK = multiprocessing.get_context("fork")


class ForkedRanks:
    """A rank that sends its rows to the process that has forked it, and gets those of all."""

    def __init__(self, rank, size, connection):
        self.rank, self.size, self._connection = rank, size, connection

    def gather(self, row):
        self._connection.send(row)
        return np.stack(self._connection.recv())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_forks(size, work):
    """Run `work(ranks)` on each rank until all have ended, or one has been killed; returns the exit codes."""
    ends = [_FORK.Pipe() for _ in range(size)]
    children = [_FORK.Process(target=_child, args=(rank, size, ends, work)) for rank in range(size)]
    for child in children:
        child.start()
    for _, far in ends:
        far.close()
    try:
        while True:
            rows = [near.recv() for near, _ in ends]
            for near, _ in ends:
                near.send(rows)
    except (EOFError, OSError):  # somebody has ended: the others' next message fails
        for near, _ in ends:
            near.close()
    for child in children:
        child.join(60)
        child.kill()
    return [child.exitcode for child in children]


def _child(rank, size, ends, work):
    for k, (near, far) in enumerate(ends):
        near.close()
        if k != rank:
            far.close()
    try:
        work(ForkedRanks(rank, size, ends[rank][1]))
    except (EOFError, OSError):
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(4)
    os._exit(0)
