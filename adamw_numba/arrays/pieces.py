"""Pieces of whole arrays, which several processes have: where they lie, and what two of them have in common."""

import math
from collections.abc import Sequence
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
        The elements of the pieces; of a run, an array of any shape that has them in order.
    there, here : Piece
    """
    run, other = there.as_run(), here.as_run()
    if run is not None and other is not None:
        there, here, source, target = run, other, source.reshape(-1), target.reshape(-1)
    elif there.is_run or here.is_run:
        return _by_the_whole(source, there, target, here)
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
    """Whether every element of the whole is in one of these pieces, and in one alone."""
    size = math.prod(pieces[0].shape) if pieces else 0
    if sum(math.prod(piece.own) for piece in pieces) != size:
        return False
    runs = [piece.as_run() for piece in pieces if 0 not in piece.own]
    if all(runs):
        places = sorted((run.start[0], run.own[0]) for run in runs if run)
        return all(at + length <= later for (at, length), (later, _) in pairwise(places))
    marks = np.zeros(size, bool)
    for piece in pieces:
        _view(marks, piece)[...] = True
    return bool(marks.all())


def _by_the_whole(source: Elements, there: Piece, target: Elements, here: Piece) -> int:
    """The same of a box and a run: each is marked in the whole."""
    number = np.full(math.prod(there.shape), -1, np.int64)  # of each element, where it is in the source
    _view(number, there)[...] = np.arange(source.size).reshape(there.own)
    wanted = _view(number, here)
    found = wanted >= 0
    target.reshape(here.own)[found] = source.reshape(-1)[wanted[found]]
    return int(found.sum())


def _view(flat: Elements, piece: Piece) -> Elements:
    array = flat if piece.is_run else flat.reshape(piece.shape)
    return array[tuple(slice(at, at + length) for at, length in zip(piece.start, piece.own, strict=True))]
