"""How far ahead a large step asks for elements: processors differ, so its first steps try what suits this one.

Every way gives the same bits. So each of the first steps goes another way and takes its time, in rounds, and from then
on all go the way that was fastest. What was found is kept in Numba's cache folder, for the next process.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from llvmlite import binding

Call = tuple[Any, ...]


class Way(NamedTuple):
    """How elements are asked for: how many of each array at a time, how many bytes ahead, for the cache of which level.

    With 0 bytes none are, and the processor does what it does by itself.
    """

    piece: int
    ahead: int
    level: int


USUAL, NONE = Way(128, 4096, 2), Way(2**30, 0, 1)
WAYS = (
    *(USUAL, NONE, Way(128, 1024, 1), Way(256, 1024, 1), Way(128, 2048, 1), Way(64, 4096, 1)),
    *(Way(32, 4096, 1), Way(256, 4096, 2)),
)
ROUNDS = 4
SLOW = 1.25  # times the fastest of the first round, from which on a way is not tried again
BETTER = 0.95  # of the usual way's time, below which another one is taken: least and median
FILE = "adamw_numba-prefetch.json"
_found: dict[str, Way] = {}
_read: set[Path] = set()  # files that have been read


class Trial:
    """The steps of one kind that have gone each way so far.

    Parameters
    ----------
    key : str
        The kind of step.
    folder : path or None
        Where to keep what is found.
    """

    def __init__(self, key: str, folder: Path | None) -> None:
        self._key, self._folder = key, folder
        self._times: list[float] = []  # before and after each step
        self._ways = list(WAYS)  # of the steps, in order

    def next(self) -> tuple[Way, bool]:
        """The way of the next step, and whether it is the last one to be tried."""
        tried = len(self._times) // 2
        if tried == len(self._ways) == len(WAYS):
            taken = self._taken()
            good = [way for way in WAYS if way == USUAL or taken[way][0] < SLOW * min(taken.values())[0]]
            self._ways += good * (ROUNDS - 1)
        if tried < len(self._ways):
            return self._ways[tried], False
        self._settle()
        return _found[self._key], True

    def timed(self, calls: Sequence[Call]) -> list[Call]:
        """The calls of a step between two looks at the clock, with no Python in between."""
        del self._times[len(self._times) // 2 * 2 :]  # of a step that was not complete
        look = self._times.extend, starmap(perf_counter, [()])
        return [look, *calls, (self._times.extend, starmap(perf_counter, [()]))]

    def _taken(self) -> dict[Way, list[float]]:
        """The seconds of the steps that went each way."""
        found: dict[Way, list[float]] = {}
        for way, start, end in zip(self._ways, self._times[::2], self._times[1::2], strict=True):
            found.setdefault(way, []).append(end - start)
        return found

    def _settle(self) -> None:
        taken = self._taken()
        best = min(taken, key=lambda way: min(taken[way]))
        is_better = all(take(taken[best]) < BETTER * take(taken[USUAL]) for take in (min, median))
        _found[self._key] = best if is_better else USUAL
        if self._folder is not None:
            with suppress(OSError):
                _keep(self._folder / FILE)


def way_of(kind: str, folder: Path | None) -> Way | Trial:
    """The way of steps of a kind, or their trial where it is not known."""
    key = f"{binding.get_host_cpu_name()}, {os.cpu_count()} processors, {kind}"
    if folder is not None and folder / FILE not in _read:
        _read.add(folder / FILE)
        for name, way in _kept(folder / FILE).items():
            _found.setdefault(name, way)
    return _found[key] if key in _found else Trial(key, folder)


def _kept(path: Path) -> dict[str, Way]:
    """What a file holds of ways that are known; nothing where it cannot be read."""
    try:
        held = json.loads(path.read_text()).items()
        return {str(key): Way(*way) for key, way in held if tuple(way) in WAYS}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(path: Path) -> None:
    """Put what was found into a file, beside what other processes have found."""
    held = _kept(path) | _found
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as temporary:
        json.dump(held, temporary)
    Path(temporary.name).replace(path)
