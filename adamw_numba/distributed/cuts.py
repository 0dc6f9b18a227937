"""How variables are cut into the shares of ranks, and shares into buckets."""

from collections.abc import Sequence
from typing import NamedTuple

from ..arrays.moments import BLOCK

ALIGNED = BLOCK  # elements, at a multiple of which a variable is cut, unless asked for: as moments of 8 bits need it


class Run(NamedTuple):
    """Elements of a variable, in the order in which they lie in memory."""

    variable: int
    start: int
    stop: int


def shares(sizes: Sequence[int], ranks: int, aligned: int = ALIGNED) -> list[list[Run]]:
    """Cut variables of so many elements, one after the other, into as many equal shares as there are ranks.

    A variable without elements is an empty run where it stands.
    """
    total, parts, before = sum(sizes), [[] for _ in range(ranks)], 0  # type: ignore[var-annotated]
    for i, size in enumerate(sizes):
        if not size:
            parts[max((rank for rank in range(ranks) if parts[rank]), default=0)].append(Run(i, 0, 0))
        start = 0
        for rank in range(ranks):
            stop = max(total * (rank + 1) // ranks - before, 0)
            stop = size if stop >= size or rank == ranks - 1 else stop - stop % aligned
            if stop > start:
                parts[rank].append(Run(i, start, stop))
                start = stop
        before += size
    return parts


def buckets(parts: Sequence[Sequence[Run]], most: int) -> list[list[list[Run]]]:
    """Cut the shares into buckets, in each of which every rank has at most so many elements."""
    cut = [_cut(runs, most) for runs in parts]
    count = max(map(len, cut), default=0)
    return [[own[k] if k < len(own) else [] for own in cut] for k in range(count)]


def _cut(runs: Sequence[Run], most: int) -> list[list[Run]]:
    found: list[list[Run]] = []
    room = 0
    for i, start, stop in runs:
        while start < stop:
            if not room:
                found.append([])
                room = most
            end = min(stop, start + room)
            found[-1].append(Run(i, start, end))
            room -= end - start
            start = end
    return found
