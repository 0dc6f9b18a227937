"""What is asked of an engine that connects processes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
Bytes = NDArray[np.uint8]


class RankError(RuntimeError):
    """Another rank has failed, or ranks do not agree: none has written anything of a step; all stop minimizing."""


@runtime_checkable
class Ranks(Protocol):
    """Processes that are connected: all that is asked of an engine.

    An engine of your own needs `rank`, `size` and `gather`, and the two others for `Sharded` alone. Every rank makes
    the same calls in the same order.

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


@runtime_checkable
class BulkRanks(Ranks, Protocol):
    """Processes that also exchange many bytes, for `Sharded`."""

    def exchange(self, send: Bytes, send_counts: Sequence[int], receive: Bytes, receive_counts: Sequence[int]) -> None:
        """Send each rank some bytes, and receive some from each: MPI's Alltoallv.

        Parameters
        ----------
        send : array of uint8
            What the ranks are to have, one after the other, in the order of the ranks.
        send_counts : list of int
            How many bytes of it are for each rank, this one included.
        receive : array of uint8
            Filled with what the ranks send, in their order.
        receive_counts : list of int
            How many bytes each sends.
        """
        ...

    def spread(self, parts: Sequence[Sequence[Bytes]]) -> None:
        """Give what each rank has to all others.

        Parameters
        ----------
        parts : list of lists of arrays of uint8
            For each rank as many arrays, of as many bytes, on all ranks. Those of this rank are filled, and those of
            the others are to be.
        """
        ...


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
