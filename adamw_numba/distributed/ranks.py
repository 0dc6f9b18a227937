"""What is asked of an engine that connects processes, and how engines are recognised."""

import sys
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..arrays.brief import brief

Rows = NDArray[np.float64]


class RankError(RuntimeError):
    """Another rank has failed, or ranks do not agree: nothing has been written on any of them."""


@runtime_checkable
class Ranks(Protocol):
    """Processes that are connected: all that is asked of an engine.

    An engine of your own needs these three. Every rank makes the same calls in the same order.

    Attributes
    ----------
    rank, size : int
        Which of how many processes this is, from 0.
    """

    rank: int
    size: int

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks, on every rank.

        Parameters
        ----------
        row : array of float64, shape (k,)
            With the same `k` on every rank.

        Returns
        -------
        array of float64, shape (size, k)
        """
        ...


def ranks_of(comm: Any) -> Ranks:
    """The processes behind a communicator.

    Raises
    ------
    TypeError
        If it is none.
    """
    mpi, distributed = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch.distributed")
    if mpi is not None and isinstance(comm, mpi.Comm):
        from .mpi import MpiRanks

        return MpiRanks(comm)
    if distributed is not None:
        from . import torch as engine

        if (found := engine.ranks_of(comm)) is not None:
            return found
    if isinstance(comm, Ranks) and not isinstance(comm, type):
        return comm
    raise TypeError(
        f"`comm` is {brief(comm)} of type {type(comm).__name__}; expected a communicator of mpi4py, a process group "
        "or a device mesh of one dimension of torch, or an object with `rank`, `size` and `gather`"
    )


def texts(ranks: Ranks, text: str) -> list[str]:
    """A text of each rank, on every rank."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = ranks.gather(np.array([float(len(own))]))[:, 0].astype(int)
    if not lengths.any():
        return [""] * ranks.size
    padded = np.zeros(lengths.max())
    padded[: len(own)] = own
    rows = ranks.gather(padded)
    return [bytes(row[:length].astype(np.uint8)).decode() for row, length in zip(rows, lengths, strict=True)]
