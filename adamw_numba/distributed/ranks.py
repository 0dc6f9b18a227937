"""What is asked of an engine that connects processes."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


class RankError(RuntimeError):
    """Another rank has failed, or ranks do not agree: none has written anything of a step; all stop minimizing."""


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
