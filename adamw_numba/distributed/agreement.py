"""How ranks decide together: a row of each rank is gathered, and the same rows give the same decision everywhere."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays.brief import cut
from .ranks import RankError, Ranks, Rows, texts

# The words of a row. The norms are those of the variables that are this rank's alone, and of those that all ranks have.
STATUS, WHAT, ITERATION, RATE, DECAY, SETTINGS, PRESENT, OWN_NORM, SHARED_NORM, ADDITIONS, WORDS = range(11)
FINE, FAILED = 0.0, 1.0
CALLS = "build", "apply", "save", "load", "minimize"
MUST_AGREE = {
    ITERATION: "the iterations differ",
    RATE: "the learning rates differ",
    DECAY: "the weight decays differ",
    SETTINGS: "the hyperparameters differ",
    SHARED_NORM: "the gradients of the replicated variables differ in their norms",
}


class Agreement:
    """What connects the optimizers of several ranks.

    Parameters
    ----------
    ranks : Ranks
    replicated : sequence of str
        Regular expressions for the names of variables that all ranks have, with the same values.

    Attributes
    ----------
    is_shared : array of bool
        Which of this rank's variables are replicated.
    """

    def __init__(self, ranks: Ranks, replicated: Sequence[str] = ()) -> None:
        self.ranks = ranks
        self._patterns = [re.compile(pattern) for pattern in replicated]
        self._pending: float | None = None  # the call that is to be decided on
        self.is_shared = np.zeros(0, bool)

    # Deciding

    @contextmanager
    def deciding(self, call: str) -> Iterator[None]:
        """Have the others know of whatever is raised before the decision."""
        self._pending = float(CALLS.index(call))
        try:
            yield
        except BaseException as error:
            if self._pending is not None:
                self._decide(np.zeros(WORDS), error)
            raise

    def decide(self, row: Rows) -> Rows:
        """The rows of all ranks, none of which has failed.

        Raises
        ------
        RankError
            If one has, or they do not agree.
        """
        return self._decide(row, None)

    def _decide(self, row: Rows, error: BaseException | None) -> Rows:
        row[WHAT], self._pending = self._pending, None
        row[STATUS] = FINE if error is None else FAILED
        rows = self.ranks.gather(row)
        if not np.all(rows[:, STATUS] == FINE):
            told = "" if error is None else cut(f"{type(error).__name__}: {error}", 2000)
            self._report(rows, texts(self.ranks, told), error)
        if not np.all(rows[:, WHAT] == row[WHAT]):
            raise RankError(f"the calls differ: {self._values(rows[:, WHAT], lambda k: CALLS[int(k)])}")
        for word, what in MUST_AGREE.items():
            values = rows[:, word]
            if not np.array_equal(values, np.full(len(values), values[0]), equal_nan=True):
                raise RankError(f"{what}: {self._values(values)}; expected the same on all ranks")
        return rows

    def _report(self, rows: Rows, told: list[str], error: BaseException | None) -> None:
        if error is None:
            first = int(np.flatnonzero(rows[:, STATUS])[0])
            raise RankError(f"rank {first}: {told[first]} (nothing has been written on any rank)")

    def _values(self, values: Rows, form: Callable[[float], Any] = float) -> str:
        found: dict[Any, list[int]] = {}
        for rank, value in enumerate(values):
            found.setdefault(form(value), []).append(rank)
        return ", ".join(f"{value} on {_ranks(those)}" for value, those in list(found.items())[:4])

    # Building


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
