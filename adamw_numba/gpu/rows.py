"""Rows of coefficients: those of the next steps, sent ahead.

The kernels choose a row by their own count of steps. So most steps send nothing, a step that the GPU skips uses the
same row again, and the replays of a captured graph follow the schedules.
"""

from collections.abc import Callable

import numpy as np

from ..arrays.runs import Matrix
from ..update import LEAST_EPSILON
from .tables import Mirror
from .words import EPSILON, FIRST, HEADER, HEADER_WORDS, ROW_COLUMNS, ROW_COUNT, ROWS, ROWS_DOUBLE, SEED

AHEAD = 128  # rows that are sent beyond those that are needed now

RowsOf = Callable[[range], tuple[Matrix, int]]  # the rows of steps, and the seed of the rounding of moments


class Rows:
    """The coefficients of consecutive steps on the device: a header, rows of float64, and the same in float32.

    Parameters
    ----------
    sets : int
        How many rows a step has.

    Attributes
    ----------
    mirror : Mirror
        Another one as soon as more rows are needed than it holds.
    """

    def __init__(self, sets: int) -> None:
        self._width = sets * ROW_COLUMNS
        self._key: object = None
        self._written: tuple[range, object] = range(0), None
        self._make(2 * AHEAD)

    def _make(self, capacity: int) -> None:
        size = capacity * self._width
        mirror = Mirror(np.zeros(HEADER_WORDS + size + (size + 1) // 2, np.int64))
        self._capacity, self._steps, self.mirror = capacity, range(0), mirror  # at once, for an interrupt

    @property
    def addresses(self) -> dict[int, int]:
        """Where they are, as entries of a descriptor."""
        header = self.mirror.address
        double = header + 8 * HEADER_WORDS
        return {HEADER: header, ROWS_DOUBLE: double, ROWS: double + 8 * self._capacity * self._width}

    def hold(self, first: int, count: int, key: object) -> bool:
        """Whether those of `count` steps from `first` on were sent, made with that key; None says they hold once."""
        held = self._steps
        return key is not None and held.start <= first and first + count <= held.stop and key == self._key

    def are_current(self, key: object) -> bool:
        """Whether any were sent, made with that key."""
        return bool(self._steps) and key == self._key

    def forget(self) -> None:
        """Send them again next time."""
        self._key = None

    def write(self, first: int, count: int, rows_of: RowsOf, key: object) -> None:
        """Work out those of `count` steps from `first` on, and of some more; `send` is to follow.

        A user's schedule may raise here, so everything is computed before anything is changed.
        """
        # Where a rate is set again at every step, as torch's schedulers do it, further rows would never be used.
        is_fleeting = key is None or (key != self._key and bool(self._steps) and first <= self._steps.start + 1)
        steps = range(first, first + count + (0 if is_fleeting else AHEAD))
        rows, seed = rows_of(steps)
        if len(steps) > self._capacity:
            self._make(len(steps))
        self._steps = range(0)  # until they have been sent
        self._fill(first, rows, seed)
        self._written = steps, key

    def send(self, stream: int) -> None:
        """Send what was written last."""
        self.mirror.send(stream)
        self._steps, self._key = self._written

    def _fill(self, first: int, rows: Matrix, seed: int) -> None:
        words, size = self.mirror.host, rows.size
        words[FIRST], words[ROW_COUNT], words[SEED] = first, len(rows), seed
        words[HEADER_WORDS:][:size].view(np.float64)[:] = rows.reshape(-1)
        with np.errstate(over="ignore", under="ignore"):
            single = rows.astype(np.float32).reshape(-1, ROW_COLUMNS)
        # An epsilon that is subnormal or 0 in float32 would divide 0 by 0.
        single[:, EPSILON] = np.maximum(single[:, EPSILON], np.float32(LEAST_EPSILON))
        words[HEADER_WORDS + self._capacity * self._width :].view(np.float32)[:size] = single.reshape(-1)
