"""Which ranks share the cores of a host."""

import os
import socket
from typing import Any

Place = list[Any]  # the name of the host, and the numbers of the cores on which the system lets the process run


def place() -> Place:
    """Where this process runs."""
    if hasattr(os, "sched_getaffinity"):
        return [socket.gethostname(), sorted(os.sched_getaffinity(0))]
    return [socket.gethostname(), list(range(os.cpu_count() or 1))]


def threads_of(rank: int, places: list[Place]) -> int | None:
    """An equal part of the cores of a rank, where it shares them with others; None where they are its own.

    What the user says by ``NUMBA_NUM_THREADS`` holds.
    """
    if os.environ.get("NUMBA_NUM_THREADS"):
        return None
    host, cores = places[rank]
    sharing = sum(name == host and not set(cores).isdisjoint(own) for name, own in places)
    return max(len(cores) // sharing, 1) if sharing > 1 else None
