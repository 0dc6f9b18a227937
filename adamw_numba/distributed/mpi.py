"""MPI, by mpi4py."""

from functools import cache
from typing import Any

import numpy as np

from .ranks import Rows


class MpiRanks:
    """The processes of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        It is duplicated, so that our messages and the user's own do not meet: once, however often it is given, since
        MPI has only some thousands.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Get_attr(_key())
        if self._comm is None:
            self._comm = comm.Dup()
            comm.Set_attr(_key(), self._comm)
        self.rank: int = comm.rank
        self.size: int = comm.size

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks: see `Ranks.gather`."""
        rows = np.empty((self.size, row.size))
        self._comm.Allgather(row, rows)
        return rows


@cache
def _key() -> int:
    """Under which a communicator keeps its duplicate, up to its own end."""
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval(delete_fn=lambda comm, key, duplicate: duplicate.Free()))
