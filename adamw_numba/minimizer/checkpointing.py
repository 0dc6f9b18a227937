"""Where a minimization is saved while it runs, and resumed from."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from ..arrays.brief import brief
from .run import Run

_SECONDS = 60  # from one save into a single file to the next


class Checkpointing:
    """Saves a run and resumes it.

    Parameters
    ----------
    checkpoint : path, Checkpoints or None
        A single file, numbered ones, or nowhere.
    run : Run
    """

    def __init__(self, checkpoint: Any, run: Run) -> None:
        self.run = run
        self.path: Path | None = None
        self.checkpoints: Any = None
        if isinstance(checkpoint, (str, os.PathLike)):
            self.path = Path(checkpoint)
            if not self.path.parent.is_dir():
                raise FileNotFoundError(
                    f"`checkpoint` is {brief(str(self.path))}, whose folder does not exist; expected one that does"
                )
        elif hasattr(checkpoint, "restore_latest"):
            self.checkpoints = checkpoint
        elif checkpoint is not None:
            raise TypeError(f"`checkpoint` is {brief(checkpoint)}; expected a path, or Checkpoints")
        self.is_on = checkpoint is not None
        if self.is_on:
            run.sign()
        self.is_read = False  # what could not be read is not overwritten
        self.saved_at = time.monotonic()
        self.saved_nit = -1

    @property
    def place(self) -> str:
        """Where the run is saved, for messages."""
        return str(self.path or getattr(self.checkpoints, "directory", self.checkpoints))

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
                raise ValueError(
                    f"`checkpoint` is {brief(self.place)}, which holds a run with another `{what}`; expected the same, "
                    "or another place"
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
        """How many iterations until the next numbered file; very many, where files are not numbered."""
        return sys.maxsize if self.checkpoints is None else self._every() - self.run.nit % self._every()

    def _every(self) -> int:
        return 1 if self.checkpoints is None else int(self.checkpoints.every)
