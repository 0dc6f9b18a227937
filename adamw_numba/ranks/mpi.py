"""MPI, by mpi4py."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np

from ..arrays.brief import brief
from .protocol import Bytes, Rows


class MpiRanks:
    """The processes of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        It is duplicated, so that our messages and the user's own do not meet: once, however often it is given, since
        MPI has only some thousands.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        if comm == MPI.COMM_NULL or comm.Is_inter():
            raise TypeError(
                f"`comm` is {brief(comm)}; expected a communicator of one group, to which this rank belongs"
            )
        self._comm = comm.Get_attr(_key())
        if self._comm is None:
            self._comm = comm.Dup()
            comm.Set_attr(_key(), self._comm)
        self._byte, self._waitall = MPI.BYTE, MPI.Request.Waitall
        self.rank: int = comm.rank
        self.size: int = comm.size

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks: see `Ranks.gather`."""
        rows = np.empty((self.size, row.size))
        self._comm.Allgather(row, rows)
        return rows

    def exchange(self, send: Bytes, send_counts: Sequence[int], receive: Bytes, receive_counts: Sequence[int]) -> None:
        """An all-to-all of bytes: see `BulkRanks.exchange`."""
        self._comm.Alltoallv(self._parts(send, send_counts), self._parts(receive, receive_counts))

    def spread(self, parts: Sequence[Sequence[Bytes]]) -> None:
        """From each to all others: see `BulkRanks.spread`."""
        # Messages of their own, and no collective call: those want all bytes at one place, where they would be copied.
        others = [(self.rank + k) % self.size for k in range(1, self.size)]
        requests = [self._comm.Irecv([each, self._byte], rank) for rank in others for each in parts[rank]]
        requests += [self._comm.Isend([each, self._byte], rank) for rank in others for each in parts[self.rank]]
        self._waitall(requests)

    def _parts(self, buffer: Bytes, counts: Sequence[int]) -> list[Any]:
        return [buffer, counts, [0, *accumulate(counts[:-1])], self._byte]


@cache
def _key() -> int:
    """Under which a communicator keeps its duplicate, up to its own end."""
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval(delete_fn=lambda comm, key, duplicate: duplicate.Free()))
