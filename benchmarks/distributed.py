"""What it costs several ranks to take a step together, beside one process that has all variables.

    mpiexec -n 2 python -m benchmarks.distributed

Every rank has an equal part of one array, and one thread. Then rank 0 has all of it and as many threads as there are
ranks, while the others sleep. It prints medians in microseconds: of a gather of one row, and of steps over 100 and over
32 million elements in all, plain and clipped.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from adamw_numba import AdamW
from adamw_numba.ranks.agreement import WORDS
from adamw_numba.ranks.mpi import MpiRanks

LARGE = 32 * 2**20
ROUNDS = 9


def median(act: Callable[[], Any], times: int, together: bool = True) -> float:
    """Microseconds."""
    found = []
    for _ in range(ROUNDS):
        if together:
            MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        for _ in range(times):
            act()
        found.append((time.perf_counter() - start) / times * 1e6)
    return statistics.median(found)


def meet() -> None:
    """Wait for the other ranks without a busy loop, which would take one of their cores."""
    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def step_of(size: int, comm: Any, threads: int, **options: Any) -> Callable[[], None]:
    """A step over one array."""
    gradient = np.random.default_rng(0).standard_normal(size, np.float32)
    optimizer = AdamW(threads=threads, **options)
    optimizer.build([np.ones(size, np.float32)], comm=comm)

    def step() -> None:
        optimizer.apply([gradient])

    for _ in range(3):
        step()
    return step


def main() -> None:
    """Measure, and print on rank 0."""
    comm = MPI.COMM_WORLD
    rank, size = comm.rank, comm.size
    ranks, row = MpiRanks(comm), np.zeros(WORDS)
    found = {"gather of a row": median(lambda: ranks.gather(row), 1000)}
    for elements, times in ((100, 1000), (LARGE, 3)):
        for name, options in (("plain", {}), ("clip", {"global_clipnorm": 1.0})):
            together = step_of(elements // size, comm, 1, **options)
            found[f"{elements} {name}, {size} ranks of one thread"] = median(together, times)
            del together
            meet()
            if rank == 0:
                alone = step_of(elements, None, size, **options)
                found[f"{elements} {name}, one process of {size} threads"] = median(alone, times, together=False)
                del alone
            meet()
    if rank == 0:
        for name, time_of_one in found.items():
            print(f"{name:45s} {time_of_one:12,.1f} us")


if __name__ == "__main__":
    main()
