"""Pieces of whole arrays, which several processes have: where they lie, and what two of them have in common."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Elements = np.ndarray[Any, Any]


class Piece(NamedTuple):
    """Which part of a whole array something is.

    Attributes
    ----------
    shape : tuple of int
        Of the whole.
    start : tuple of int
        Where the part begins, along each axis; or, of a run of elements in the order of the axes, one number.
    own : tuple of int
        The shape of the part; of a run one number.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def is_run(self) -> bool:
        """Whether it is a run of elements, which no box is."""
        return len(self.start) != len(self.shape)

    def as_run(self) -> "Piece | None":
        """The same part as a run of elements; None if it is none."""
        if self.is_run or len(self.shape) == 1:
            return self
        if 0 in self.own:
            return Piece(self.shape, (0,), (0,))
        if not self.shape:
            return Piece((), (0,), (1,))
        first = next((k for k, length in enumerate(self.own) if length > 1), len(self.own) - 1)
        if self.own[first + 1 :] != self.shape[first + 1 :]:
            return None
        return Piece(self.shape, (int(np.ravel_multi_index(self.start, self.shape)),), (math.prod(self.own),))

    def fault(self) -> str | None:
        """What is wrong with it; None if it lies within the whole."""
        room = (math.prod(self.shape),) if self.is_run else self.shape
        if len(self.start) != len(self.own) or len(self.start) != len(room):
            return f"begins at {self.start} and has shape {self.own}"
        if any(
            at < 0 or length < 0 or at + length > all_
            for at, length, all_ in zip(self.start, self.own, room, strict=True)
        ):
            return f"begins at {self.start}, has shape {self.own}, and does not lie within"
        return None


def places_of(piece: Piece) -> tuple[int, tuple[int, ...]]:
    """Where a part's elements are in the order of the axes of the whole: the first, and the steps along each axis."""
    if piece.is_run:
        return piece.start[0], (1,)
    steps = tuple(math.prod(piece.shape[k + 1 :]) for k in range(len(piece.shape)))
    return sum(at * step for at, step in zip(piece.start, steps, strict=True)), steps


def whole(shape: Sequence[int]) -> Piece:
    """All of an array."""
    return Piece(tuple(shape), (0,) * len(shape), tuple(shape))


def copy_common(source: Elements, there: Piece, target: Elements, here: Piece) -> int:
    """Copy what two pieces of one whole have in common; returns how many elements.

    Parameters
    ----------
    source, target : numpy.ndarray
        The elements of the pieces; of a run, a contiguous array of any shape that has them in order.
    there, here : Piece
    """
    run, other = there.as_run(), here.as_run()
    if run is not None and other is not None:
        return _copy_common(source.reshape(-1), run, target.reshape(-1), other)
    # A run and a box: each box of the run is a part of its elements that lies together.
    sources = _in_boxes(source, there) if there.is_run else [(source, there)]
    targets = _in_boxes(target, here) if here.is_run else [(target, here)]
    return sum(_copy_common(*each, *other) for each in sources for other in targets)


def _copy_common(source: Elements, there: Piece, target: Elements, here: Piece) -> int:
    """The same of two boxes, or of two runs."""
    lows = [max(pair) for pair in zip(there.start, here.start, strict=True)]
    ends = [[at + length for at, length in zip(piece.start, piece.own, strict=True)] for piece in (there, here)]
    highs = [min(pair) for pair in zip(*ends, strict=True)]
    if any(high <= low for low, high in zip(lows, highs, strict=True)):
        return 0
    of_each = [
        tuple(slice(low - at, high - at) for low, high, at in zip(lows, highs, piece.start, strict=True))
        for piece in (there, here)
    ]
    target[of_each[1]] = source[of_each[0]]
    return math.prod(high - low for low, high in zip(lows, highs, strict=True))


def make_whole(pieces: Sequence[Piece]) -> bool:
    """Whether every element of the whole is in one of these pieces, and in one alone; each lies within the whole.

    It takes no memory in proportion to the whole, whose shape may be that of a forged file.
    """
    if not pieces or sum(math.prod(piece.own) for piece in pieces) != math.prod(pieces[0].shape):
        return False
    # As many elements as the whole has: there is a gap only where two overlap.
    runs = [piece.as_run() for piece in pieces if 0 not in piece.own]
    if all(runs):
        places = sorted((run.start[0], run.own[0]) for run in runs if run)
        return all(at + length <= later for (at, length), (later, _) in pairwise(places))
    boxes = [box for piece in pieces for box in (_boxes(piece) if piece.is_run else [piece]) if 0 not in piece.own]
    low = np.array([box.start for box in boxes], np.int64).T
    return not _overlap(low, low + np.array([box.own for box in boxes], np.int64).T)


def _overlap(low: Elements, high: Elements) -> bool:
    """Whether any two boxes overlap, whose bounds are the columns."""
    # Along the axis that tells most of them apart, each is compared with those alone that begin before its end.
    axis = max(range(len(low)), key=lambda k: len(np.unique(low[k])))
    order = np.argsort(low[axis])
    low, high = low[:, order], high[:, order]
    ends = np.searchsorted(low[axis], high[axis]).tolist()
    return any(
        ((low[:, k + 1 : end] < high[:, k, None]) & (low[:, k, None] < high[:, k + 1 : end])).all(axis=0).any()
        for k, end in enumerate(ends)
        if end > k + 1
    )


def _boxes(run: Piece) -> list[Piece]:
    """A run as boxes, in its order: at most one of rows, planes, ... on the way up, and one on the way down."""
    shape, (at,), (count,) = run.shape, run.start, run.own
    sizes = [math.prod(shape[k + 1 :]) for k in range(len(shape))]  # of what one index along each axis is
    found = []
    while count:
        axis = next(k for k, size in enumerate(sizes) if at % size == 0 and size <= count)
        start = [at // size % length for size, length in zip(sizes, shape, strict=True)]
        length = min(count // sizes[axis], shape[axis] - start[axis])
        found.append(Piece(shape, tuple(start), (*[1] * axis, length, *shape[axis + 1 :])))
        at, count = at + length * sizes[axis], count - length * sizes[axis]
    return found


def _in_boxes(elements: Elements, run: Piece) -> Iterator[tuple[Elements, Piece]]:
    flat, at = elements.reshape(-1), 0
    for box in _boxes(run):
        size = math.prod(box.own)
        yield flat[at : at + size].reshape(box.own), box
        at += size
