"""`Checkpoints`: a folder of numbered saves, of which the newest whole one counts."""

import os
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..arrays.brief import brief_names
from ..hyperparameters.table import flag, integer
from ..ranks.joining import deciding
from . import archive, folders, snapshot
from .stores.atomic import CorruptFileError, remove
from .stores.targets import check_no_url, check_target


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` has found.

    Attributes
    ----------
    step : int
    extra : object
        The payload that was saved beside the state.
    path : pathlib.Path
    """

    step: int
    extra: Any
    path: Path


class Checkpoints:
    """Numbered files in a folder: the newest few are kept, and a damaged one falls back to the one before.

    Parameters
    ----------
    directory : path
        Made where it does not exist.
    keep : int, default 3
        How many files to keep; older ones are removed once a newer one is on disk.
    every : int, default 1
        `save` does nothing at a step that is not a multiple of it.
    background : bool, default False
        Copy the state and write it from another thread, one file at a time; the next call raises what went wrong.
    suffix : str, default ".npz"
        The kind of file: see `AdamW.save`; "" for the folders of optimizers that are connected with other processes,
        all of which make the same calls.
    durable : bool, default True

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from adamw_numba import AdamW
    >>> variables = {"w": np.ones(2)}
    >>> optimizer = AdamW()
    >>> optimizer.build(variables)
    >>> folder = tempfile.mkdtemp()
    >>> with Checkpoints(folder, every=10) as checkpoints:
    ...     for step in range(25):
    ...         optimizer.apply({"w": np.ones(2)})
    ...         path = checkpoints.save(optimizer, step + 1, extra={"seed": 0}, variables=True)
    ...     restored = checkpoints.restore_latest(optimizer)
    >>> restored.step, restored.extra, optimizer.iterations
    (20, {'seed': 0}, 20)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 3,
        every: int = 1,
        background: bool = False,
        suffix: str = ".npz",
        durable: bool = True,
    ) -> None:
        self.keep: int = integer(1, optional=False)("keep", keep)
        self.every: int = integer(1, optional=False)("every", every)
        self.background, self.durable = flag("background", background), flag("durable", durable)
        check_no_url("directory", str(directory))
        self.directory, self.suffix = Path(directory).absolute(), suffix
        if suffix:
            check_target(self._path(0))
        elif background:
            raise ValueError("`background` is True, which processes that save together cannot have; expected False")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writer: ThreadPoolExecutor | None = None
        self._writing: list[Future[None]] = []  # at most one, until its outcome was reported
        weakref.finalize(self, _tell_unless_told, self._writing)
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self, optimizer: Any, step: int, extra: Any = None, variables: bool = False, force: bool = False
    ) -> Path | None:
        """Save at a step that is a multiple of `every`, or, with `force`, at any.

        Where a run has gone back to an earlier step, the files of later steps are removed once this one is on disk.

        Parameters
        ----------
        optimizer : AdamW or LossScaleOptimizer
        step : int
            The number in the file's name; a file of the same number is replaced.
        extra, variables
            As in `AdamW.save`.
        force : bool

        Returns
        -------
        pathlib.Path or None
            The file, which with ``background=True`` may still be being written; None where nothing is saved.

        Raises
        ------
        OSError
            If this file, or in the background the last one, could not be written.
        ValueError
            If `suffix` or `background` is not for this optimizer.
        """
        together = connection_of(optimizer)
        with deciding(together, "save"):
            step = integer(0, optional=False)("step", step)
        self._check_kind(together)
        if step % self.every and not force:
            if any(writing.done() for writing in self._writing):
                self._finish()
            return None
        self._finish()
        path = self._path(step)
        if not self.background:
            optimizer.save(path, extra, variables, self.durable)
            with folders.agreeing(together, "save") as agreed:
                if together is None or together.ranks.rank == 0:
                    self._prune(step)
                agreed()
            return path
        taken = snapshot.take(optimizer, extra, variables, copy=True)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "adamw_numba checkpoints")
        self._writing.append(self._writer.submit(self._write, step, taken))
        return path

    def latest(self) -> Path | None:
        """The newest file that is whole, read and verified to its end; None if there are no files.

        Warns
        -----
        UserWarning
            For every newer file that is damaged.

        Raises
        ------
        CorruptFileError
            If there are files and none is whole.
        OSError
            If one cannot be read, which does not mean that it is damaged.
        """
        found = self._newest(folders.verify)
        return None if found is None else self._path(found[0])

    def restore_latest(self, optimizer: Any) -> Restored | None:
        """Restore a built optimizer from the newest file that is whole; None if there are no files.

        Parameters
        ----------
        optimizer : AdamW or LossScaleOptimizer
            See `AdamW.restore`: a file that is whole and does not fit is an error.

        Returns
        -------
        Restored or None
            The ``step``, the ``extra`` payload and the ``path``.

        Warns
        -----
        UserWarning
            For every newer file that is damaged.

        Raises
        ------
        CorruptFileError
            If there are files and none is whole.
        OSError
            If one cannot be read, which does not mean that it is damaged.
        """
        together = connection_of(optimizer)
        if together is None:
            found = self._newest(optimizer.restore)
        else:  # each rank reads some of the files, and all decide on the same step
            with folders.agreeing(together, "restore") as agreed:
                own = self._steps()
                agreed()
            steps = together.tell(own)[0]
            found = self._newest(lambda path: _verify_with(together, path), steps)
            found = None if found is None else (found[0], optimizer.restore(self._path(found[0])))
        return None if found is None else Restored(*found, self._path(found[0]))

    def _newest(self, act: Callable[[Path], Any], steps: Sequence[int] | None = None) -> tuple[int, Any] | None:
        """The newest step whose file can be used, and what `act` returned for it."""
        self._finish()
        damaged = []
        steps = self._steps() if steps is None else steps
        others = [name for name in os.listdir(self.directory) if re.fullmatch(r"step-\d{12,}(\.[\w.]+)?", name)]
        if not steps and others:
            raise ValueError(
                f"{self.directory} holds {brief_names(sorted(others))}, and nothing with the suffix {self.suffix!r}; "
                "expected the suffix that they were saved with"
            )
        for step in reversed(steps):
            try:
                return step, act(self._path(step))
            except (CorruptFileError, FileNotFoundError) as error:  # another process may have removed it
                damaged.append(error)
                warnings.warn(f"a checkpoint is left out, and the one before is used: {error}", stacklevel=3)
        if self._steps():
            raise CorruptFileError(
                f"{self.directory} holds {len(damaged)} checkpoints, none of which can be used; expected one that is "
                f"whole, or none at all. The newest: {damaged[0] if damaged else 'was just written'}"
            )
        return None

    def close(self) -> None:
        """Wait for the file that is being written; raise what went wrong with it."""
        try:
            self._finish()
        finally:
            if not self._writing and self._writer is not None:  # otherwise interrupted, and to be called again
                self._writer.shutdown()
                self._writer = None

    def _check_kind(self, together: Any) -> None:
        """Refuse a suffix that is not for this optimizer, also at steps at which nothing is saved."""
        if together is None and not self.suffix:
            raise ValueError(
                "`suffix` is '', and the optimizer is not connected with those of other processes; expected the suffix "
                "of a file, such as '.npz'"
            )
        if together is not None and self.suffix:
            with folders.agreeing(together, "save"):  # it may be another one on the other ranks
                raise ValueError(
                    f"`suffix` is {self.suffix!r} and `background` {self.background}, and the optimizer is connected "
                    "with those of other processes; expected '' and False"
                )

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:012d}{self.suffix}"

    def _steps(self) -> list[int]:
        pattern = re.compile(rf"step-(\d{{12,}}){re.escape(self.suffix)}")
        found = (pattern.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in found if match)

    def _write(self, step: int, taken: snapshot.Snapshot) -> None:
        archive.write(self._path(step), *taken, self.durable)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove later steps, which belong to a run that was given up, and the oldest beyond those to keep."""
        steps = self._steps()
        earlier = [step for step in steps if step < newest]
        for step in [*earlier[: max(0, len(earlier) + 1 - self.keep)], *(step for step in steps if step > newest)]:
            remove(self._path(step))

    def _finish(self) -> None:
        if self._process != os.getpid():  # a fork: the thread is in the parent, and so is what it writes
            self._process, self._writer = os.getpid(), None
            self._writing.clear()
        wait(self._writing)  # nothing is removed before, so that an interrupt here loses no error
        errors = [writing.exception() for writing in self._writing]
        self._writing.clear()
        for error in filter(None, errors):
            raise error


def connection_of(optimizer: Any) -> Any:
    """What connects an optimizer, or the one inside it, with those of other processes; None if nothing does."""
    return snapshot.engine_of(getattr(optimizer, "optimizer", optimizer)).together


def _verify_with(together: Any, path: Path) -> None:
    """Read a folder's files, each by one rank; an error of one of them is raised on all."""
    found = ""
    with folders.agreeing(together, "restore") as agreed:
        try:
            folders.verify(path, together.ranks.rank, together.ranks.size)
        except (CorruptFileError, FileNotFoundError) as error:
            found = f"{error}"
        agreed()
    for rank, error_there in enumerate(together.tell(found)):
        if error_there:
            raise CorruptFileError(f"{error_there} (seen by rank {rank})")


def _tell_unless_told(writing: list[Future[None]]) -> None:
    """Warn of an error that nobody has asked for, since `close` was not called: now, or when the file is written."""
    for future in writing:
        future.add_done_callback(_tell)


def _tell(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        warnings.warn(f"a checkpoint could not be written, and nobody has called `close`: {error!r:.400}", stacklevel=2)
