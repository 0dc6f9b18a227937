"""MPI, by mpi4py."""

from typing import Any

import numpy as np

from .ranks import Rows


class MpiRanks:
    """The processes of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        It is duplicated, so that our messages and the user's own do not meet.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self.rank: int = comm.rank
        self.size: int = comm.size

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks: see `Ranks.gather`."""
        rows = np.empty((self.size, row.size))
        self._comm.Allgather(row, rows)
        return rows
