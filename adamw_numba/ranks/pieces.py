"""Where the parts of variables that ranks have lie in the whole ones."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.pieces import Piece, make_whole, whole
from .protocol import RankError

Told = list[Any]  # of a variable: its name, shape, dtype, and what is told of its place


def read(pieces: Any, names: Sequence[str], variables: Sequence[Array], shared: Iterable[bool]) -> list[Any]:
    """What a user says of the places of variables, to be told to the other ranks; None of those not mentioned.

    Raises
    ------
    TypeError, ValueError
        If it is no mapping of names to slices, or does not fit a variable.
    """
    pieces = {} if pieces is None else pieces
    if not isinstance(pieces, Mapping):
        raise TypeError(f"`pieces` is {brief(pieces)}; expected a dict of names to tuples of slices")
    unknown = [name for name in pieces if name not in names]
    if unknown:
        raise ValueError(f"`pieces` names {brief(unknown[0])}; expected names of variables: {brief(list(names))}")
    told = {name for name, given in pieces.items() if not isinstance(given, Piece)}
    both = [name for name, own in zip(names, shared, strict=True) if own and name in told]
    if both:
        raise ValueError(f"`pieces` names {brief(both[0])}, which is replicated; expected the names of other variables")
    shapes = [tuple(int(length) for length in variable.shape) for variable in variables]
    return [
        _told(name, pieces[name], shape) if name in pieces else None for name, shape in zip(names, shapes, strict=True)
    ]


def _told(name: str, given: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(given, Piece):
        return [given.shape, given.start]
    found = given if isinstance(given, tuple) else (given,)
    fits = len(found) == len(shape) and all(isinstance(each, slice) and each.step in (None, 1) for each in found)
    starts: list[int] = []
    ends: list[int] = []
    try:
        starts = [0 if each.start is None else operator.index(each.start) for each in found] if fits else []
        ends = [
            at + n if o.stop is None else operator.index(o.stop) for o, at, n in zip(found, starts, shape, strict=False)
        ]
    except TypeError:  # not integers
        fits = False
    if not fits or any(at < 0 or end - at != n for at, end, n in zip(starts, ends, shape, strict=True)):
        raise ValueError(
            f"`pieces` has {brief(given)} for {brief(name)} of shape {shape}; expected a slice of the whole variable "
            "for each of its axes, as long as the axis"
        )
    return [None, starts]


def placed(told: Sequence[Sequence[Told]], shared: set[str]) -> dict[str, list[tuple[int, Piece | None]]]:
    """The ranks of every variable and their pieces, which are None where they do not make a whole.

    Where nothing is said, they follow each other along the first axis in the order of the ranks.

    Parameters
    ----------
    told : list of lists
        What each rank tells of its variables.
    shared : set of str
        The names of those that every rank has as a whole.

    Raises
    ------
    RankError
        If only some ranks say where their part of a variable is, or the parts make no whole.
    """
    of: dict[str, list[tuple[int, Told]]] = {}
    for rank, own in enumerate(told):
        for each in own:
            of.setdefault(each[0], []).append((rank, each))
    found = {}
    for name, parts in of.items():
        ranks, entries = [rank for rank, _ in parts], [each for _, each in parts]
        found[name] = list(zip(ranks, _places(name, entries, ranks, name in shared), strict=True))
    return found


def _places(name: str, entries: list[Told], ranks: list[int], shared: bool) -> list[Piece | None]:
    shapes, places = [tuple(each[1]) for each in entries], [each[3] for each in entries]
    if shared or (len(entries) == 1 and places[0] is None):
        return [whole(shape) for shape in shapes]
    if any(place is not None for place in places):
        if any(place is None for place in places):
            said = [rank for rank, place in zip(ranks, places, strict=True) if place is None]
            raise RankError(
                f"`pieces` says nothing of {brief(name)} on rank {said[0]}; expected it on all that have it"
            )
        if len({len(own) for own in shapes}) > 1 or len({each[2] for each in entries}) > 1:
            raise RankError(f"the parts of {brief(name)} have other numbers of axes, or dtypes, on other ranks")
        shape = places[0][0]
        if shape is None:
            ends = [
                [at + n for at, n in zip(place[1], own, strict=True)] for place, own in zip(places, shapes, strict=True)
            ]
            shape = [max(each) for each in zip(*ends, strict=True)]
        found = [Piece(tuple(shape), tuple(place[1]), own) for place, own in zip(places, shapes, strict=True)]
        if not make_whole(found if places[0][0] is None else list(dict.fromkeys(found))):  # DTensors may have copies
            told = brief([[list(piece.start), list(piece.own)] for piece in found])
            raise RankError(
                f"the pieces of {brief(name)} overlap, or leave gaps: where they begin, and their shapes, are {told}, "
                f"in the order of the ranks; expected every element of {tuple(shape)} once"
            )
        return found  # type: ignore[return-value]
    if not shapes[0] or len({own[1:] for own in shapes}) > 1 or len({each[2] for each in entries}) > 1:
        return [None] * len(shapes)
    lengths = [own[0] for own in shapes]
    shape = (sum(lengths), *shapes[0][1:])
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    return [Piece(shape, (at, *[0] * (len(shape) - 1)), own) for at, own in zip(starts, shapes, strict=True)]
