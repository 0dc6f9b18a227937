"""What a minimization does besides: saving and resuming, signals, progress, and what an exception says."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .run import Run

_SECONDS = 60  # from one save into a single file to the next


class Keeper:
    """Saves a run and resumes it.

    Parameters
    ----------
    checkpoint : path, Checkpoints or None
        A single file, or numbered ones.
    run : Run
    """

    def __init__(self, checkpoint: Any, run: Run) -> None:
        self.run = run
        self.path: Path | None = None
        self.checkpoints: Any = None
        if checkpoint is not None:
            if isinstance(checkpoint, (str, os.PathLike)):
                self.path = Path(checkpoint)
            elif hasattr(checkpoint, "restore_latest"):
                self.checkpoints = checkpoint
            else:
                raise TypeError(f"`checkpoint` is {checkpoint!r}; expected a path, or Checkpoints")
        self.is_on = checkpoint is not None
        if self.is_on:
            run.sign()
        self.is_read = False  # nothing is written over what could not be read
        self.saved_at = time.monotonic()
        self.saved_nit = -1

    def restore(self) -> None:
        """Go on from what is saved, if anything is, with the learning rate of this call."""
        origin, scalars = self.run.origin.copy(), self.run.optimizer.engine.state.scalars
        rate = scalars["learning_rate"].copy() if "learning_rate" in scalars else None
        if self.path is not None and self.path.exists():
            self.run.optimizer.restore(self.path)
        elif self.checkpoints is not None:
            self.checkpoints.restore_latest(self.run.optimizer)
        for what, ours, saved in zip(("x0", "bounds"), origin, self.run.origin, strict=True):
            if ours != saved:
                place = self.path or self.checkpoints
                raise ValueError(
                    f"`checkpoint` is {str(place)!r}, which holds a run with another `{what}`; expected the same, or "
                    "another place"
                )
        if rate is not None:
            scalars["learning_rate"][...] = rate
        self.is_read = True

    def save(self) -> None:
        """Save the run as it is, if there is a place for it."""
        if self.is_on and self.saved_nit != self.run.nit:
            self.run.stamp()
            if self.path is not None:
                self.run.optimizer.save(self.path, variables=self.run.mutable)
            else:
                self.checkpoints.save(self.run.optimizer, self.run.nit, variables=self.run.mutable, force=True)
            self.saved_nit, self.saved_at = self.run.nit, time.monotonic()

    def finish(self) -> None:
        """Save the end, and wait for what is still being written."""
        self.save()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def save_if_due(self) -> None:
        """Save every so many iterations, or once a minute into a single file."""
        if self.path is not None:
            due = time.monotonic() - self.saved_at > _SECONDS
        else:
            due = self.is_on and self.run.nit % self._every() == 0
        if due:
            self.save()

    def iterations_left(self) -> int:
        """How many iterations until the next numbered file; many, where files are not numbered."""
        return sys.maxsize if self.checkpoints is None else self._every() - self.run.nit % self._every()

    def _every(self) -> int:
        return 1 if self.checkpoints is None else int(self.checkpoints.every)


@contextmanager
def caught_signals(wanted: bool) -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGINT are noted and not obeyed, if wanted and in the main thread; a second one is obeyed."""
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        for number in numbers:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A bar of tqdm, a function of the user's, or nothing.

    Parameters
    ----------
    wanted : bool or callable
    total : int
        The most iterations.
    """

    def __init__(self, wanted: Any, total: int) -> None:
        self.function = wanted if callable(wanted) else None
        self.bar: Any = None
        self.shown = 0.0
        if wanted is True:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, disable=None, unit="it")

    def show(self, run: Run) -> None:
        """What is known by now."""
        if self.function is not None:
            self.function(run.intermediate())
        if self.bar is not None and (run.reason or time.monotonic() - self.shown > 0.1):
            self.shown = time.monotonic()
            self.bar.set_postfix(fun=f"{run.values[0]:.6g}", refresh=False)
            self.bar.update(run.nit - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def explain(error: BaseException, run: Run, keeper: Keeper) -> None:
    """Say in the exception's notes how far it got, and save that where there is a place for it."""
    result = run.result()
    where = f"adamw_numba.minimize: at iteration {run.nit}; best value so far {result.fun!r} at x = {result.x!r}"
    error.add_note(where)
    try:
        error.intermediate_result = result  # type: ignore[attr-defined]
        error.add_note("the result so far is the `intermediate_result` of this exception")
    except AttributeError:
        pass
    if keeper.is_read and keeper.is_on:
        try:
            keeper.finish()
            error.add_note(f"the state is saved in {keeper.path or keeper.checkpoints}")
        except Exception as failure:
            error.add_note(f"the state could not be saved: {failure!r}")
