"""What happened at each iteration of a minimization, in bounded memory."""

from typing import Any

import numpy as np

COLUMNS = ("nit", "fun", "gradient_norm", "learning_rate", "step_norm", "time")
Rows = np.ndarray[Any, Any]


class History:
    """Every `stride`-th iteration and the last one; the stride doubles whenever the rows are full.

    Parameters
    ----------
    rows : array of float64, shape (capacity, 6)
        Where to keep them.
    last : array of float64, shape (6,)
    marks : array of int64, shape (2,)
        How many rows there are, and the stride.
    """

    def __init__(self, rows: Rows, last: Rows, marks: Rows) -> None:
        self.rows, self.last, self.marks = rows, last, marks
        marks[1] = 1

    @property
    def stride(self) -> int:
        """Iterations from one row to the next."""
        return int(self.marks[1])

    def extend(self, block: Rows) -> None:
        """Add the rows of consecutive iterations; those between strides, except the last, may be left out."""
        self.last[:] = block[-1]
        if not len(self.rows):
            return
        chosen = block[block[:, 0] % self.marks[1] == 0]
        while self.marks[0] + len(chosen) > len(self.rows):
            self._thin()
            chosen = block[block[:, 0] % self.marks[1] == 0]
        count = self.marks[0] + len(chosen)
        self.rows[self.marks[0] : count] = chosen
        self.marks[0] = count

    def _thin(self) -> None:
        self.marks[1] *= 2
        kept = self.rows[: self.marks[0]]
        kept = kept[kept[:, 0] % self.marks[1] == 0]
        self.rows[: len(kept)] = kept
        self.marks[0] = len(kept)

    def columns(self) -> dict[str, Rows]:
        """The rows as one array per column."""
        rows = self.rows[: self.marks[0]]
        if len(self.rows) and self.marks[0] and rows[-1, 0] != self.last[0]:
            rows = np.vstack([rows, self.last])
        table = {name: rows[:, k].copy() for k, name in enumerate(COLUMNS)}
        return table | {"nit": table["nit"].astype(np.int64)}
