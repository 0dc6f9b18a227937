"""How many steps the GPU has counted, and what the host knows of it without asking.

The GPU counts by itself: a step that it skips, or that a replayed graph takes, is unknown to the host until it asks,
and to ask is to wait. So it asks only when the user looks at the count.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from ..arrays import gpu as gpu_arrays
from ..arrays.runs import Matrix
from .driver import Event
from .streams import stream_of, wait_for_all
from .words import CLIPPED, COUNTERS, GO, GUARDED, NORM, SKIPPED


class Known(NamedTuple):
    """What the host knows. A step changes it with one assignment, so an interrupt comes before it or after it."""

    iteration: int = 0  # steps counted by the GPU, as far as the host was told
    launched: int = 0  # steps that were launched
    # The GPU had counted at least `least` steps once the first `at_least` of them had been launched.
    least: int = 0
    at_least: int = 0
    is_certain: bool = True  # whether `iteration` is the GPU's own
    pending: bool = False  # whether the GPU may have counted otherwise than the host, and nobody has asked
    norm_pending: bool = False  # whether there is a norm that nobody has asked for
    has_norm: bool = False  # whether the last step took one
    is_guarded: bool = False  # whether the last step may have been skipped
    has_captures: bool = False  # whether a graph was captured: from then on the host is never certain
    captured_flags: int = 0

    def told(self, iteration: int) -> "Known":
        """After the GPU was asked, or told, how far it is to have counted."""
        return self._replace(
            iteration=iteration,
            least=iteration,
            at_least=self.launched,
            is_certain=not self.has_captures,
        )

    def counted(self, decides: bool, normed: bool, guarded: bool) -> "Known":
        """After a step was launched, on which the GPU decides or not."""
        launched, count = self.launched + 1, self.iteration + 1
        if decides:
            first = self.iteration, launched, self.least, self.at_least, False, True
        else:
            first = count, launched, count, launched, self.is_certain, self.has_captures
        # `Known(...)` takes twice as long, and `_replace` eight times.
        return tuple.__new__(Known, (*first, normed, normed, guarded, self.has_captures, self.captured_flags))

    def captured(self, flags: int) -> "Known":
        """After a step was captured: nobody tells how often it is replayed."""
        return self._replace(
            has_captures=True, is_certain=False, pending=True, captured_flags=flags & (CLIPPED | GUARDED)
        )


class Report(NamedTuple):
    """What the GPU says of the steps so far."""

    iteration: int
    norm: float | None  # of the last step, if it took one
    applied: bool  # the last step
    known: Known  # what the host knows once it has taken note


class Counter:
    """The control words of one GPU: the count of each group, what was decided, and what the host has to be told.

    Attributes
    ----------
    known : Known
    skipped : int
        Steps that the GPU has skipped, by the reports so far; whoever takes note of them sets it back to 0.
    words : Numba's device array
    """

    def __init__(self) -> None:
        self.known = Known()
        self.skipped = 0
        self.words: Any = None
        self._skipped_before = 0
        self._peek: tuple[Matrix, Any, int] | None = None

    @property
    def address(self) -> int:
        """Where the control words lie on the device."""
        return gpu_arrays.address(self.words)

    def renew(self, groups: int) -> None:
        """Count on with as many groups as there are now; waits for the GPU."""
        before = self.known
        if self.words is not None:
            self.known = self.report(self.read()).known
        iteration = self.known.iteration
        self.words = cuda.to_device(np.zeros(COUNTERS + groups, np.int64))
        self._skipped_before, self._peek = 0, None
        self.set(iteration)
        if not before.is_certain:
            self._have_told_nobody(before)

    def go_on(self, iteration: int) -> None:
        """Have the GPU, which stopped there for want of coefficients, go on; the host has yet to be told."""
        before = self.known
        self.set(iteration)
        self._have_told_nobody(before)

    def _have_told_nobody(self, before: Known) -> None:
        self.known = self.known._replace(iteration=before.iteration, is_certain=False, pending=before.pending)

    def set(self, iteration: int) -> None:
        """Have the GPU count on from another number; waits for it."""
        self._collect(self.read())
        words = np.zeros(self.words.size, np.int64)
        words[GO], words[COUNTERS:] = 1, iteration
        self.words.copy_to_device(words)
        wait_for_all()
        self._skipped_before = 0
        self.known = self.known.told(iteration)

    def read(self) -> Matrix:
        """The control words; waits for the GPU."""
        wait_for_all()  # a graph may have been replayed in any stream
        words: Matrix = self.words.copy_to_host()
        return words

    def report(self, words: Matrix) -> Report:
        """What the control words say."""
        self._collect(words)
        known = self.known.told(int(words[COUNTERS]))
        norm = float(words[NORM : NORM + 1].view(np.float64)[0])
        applied = bool(words[GO]) or not known.is_guarded
        after = known._replace(pending=known.has_captures, norm_pending=known.has_captures)
        return Report(known.iteration, norm if known.has_norm else None, applied, after)

    def next_steps(self) -> tuple[int, int]:
        """The first step that the next launch may be, and how many it may be, by what is known for certain."""
        known = self.known
        return known.least, 1 + known.launched - known.at_least

    def look(self, stream: int) -> None:
        """Learn, without waiting, how far the GPU had counted when this was last called, and ask again.

        Otherwise the steps that the next one may be would grow without end while steps may be skipped.
        """
        if self.known.is_certain:
            return
        if self._peek is None:
            self._peek = cuda.pinned_array(self.words.shape, np.int64), Event(), -1
        words, event, launched = self._peek
        if not event.is_over():
            return
        if launched >= self.known.at_least:  # otherwise the host has been told more since
            self.known = self.known._replace(least=int(words[COUNTERS]), at_least=launched)
        self.words.copy_to_host(words, stream_of(stream))
        event.record(stream)
        self._peek = words, event, self.known.launched

    def after(self, flags: int, is_captured: bool, counts: bool, decides: bool, normed: bool) -> Known:
        """What the host will know once a step is launched."""
        guarded = bool(flags & GUARDED)
        if counts and not is_captured:
            return self.known.counted(decides, normed, guarded)
        known = self.known.captured(flags) if is_captured else self.known
        return known._replace(has_norm=normed, is_guarded=guarded)

    def _collect(self, words: Matrix) -> None:
        """Count the skipped steps that the control words tell of."""
        skipped = int(words[SKIPPED])
        self.skipped += skipped - self._skipped_before
        self._skipped_before = skipped
