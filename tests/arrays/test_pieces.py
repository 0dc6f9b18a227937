"""Pieces of arrays: what two of them have in common, found by marking every element."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba.arrays.pieces import Piece, copy_common, make_whole, whole


@st.composite
def shapes_and_pieces(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    return shape, draw(pieces_of(shape)), draw(pieces_of(shape))


@st.composite
def pieces_of(draw, shape):
    kind = draw(st.sampled_from(["whole", "run", "box"]))
    if kind == "whole":
        return whole(shape)
    room = (math.prod(shape),) if kind == "run" else shape
    start = tuple(draw(st.integers(0, length)) for length in room)
    return Piece(shape, start, tuple(draw(st.integers(0, n - at)) for n, at in zip(room, start, strict=True)))


def cut(array, piece):
    array = array.reshape(-1) if piece.is_run else array
    return array[tuple(slice(at, at + n) for at, n in zip(piece.start, piece.own, strict=True))].copy()


@given(shapes_and_pieces())
def test_what_pieces_have_in_common(drawn):
    shape, there, here = drawn
    values = np.arange(math.prod(shape), dtype=float).reshape(shape)
    source, target = cut(values, there), np.full(here.own, -1.0)
    expected = np.where(np.isin(cut(values, here), source), cut(values, here), -1.0)
    assert copy_common(source, there, target, here) == np.isin(cut(values, here), source).sum()
    np.testing.assert_array_equal(target, expected)
    assert there.fault() is None


@given(st.data())
def test_pieces_that_make_a_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=2)))
    pieces = data.draw(st.lists(pieces_of(shape), min_size=1, max_size=4))
    found = np.concatenate([cut(np.arange(math.prod(shape)).reshape(shape), piece).reshape(-1) for piece in pieces])
    assert make_whole(pieces) == (sorted(found.tolist()) == list(range(math.prod(shape))))


@st.composite
def partitions(draw):
    """Boxes and runs that make a whole; then, perhaps, one that is moved, left out or there twice."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, box.own[axis]))
        for at, length in ((0, first), (first, box.own[axis] - first)):
            start, own = list(box.start), list(box.own)
            start[axis], own[axis] = start[axis] + at, length
            boxes.append(Piece(shape, tuple(start), tuple(own)))
    pieces = []
    for box in boxes:
        run = box.as_run() if len(shape) > 1 else None
        if run is None or draw(st.booleans()):
            pieces.append(box)
        else:
            first = draw(st.integers(0, run.own[0]))
            pieces += [Piece(shape, run.start, (first,)), Piece(shape, (run.start[0] + first,), (run.own[0] - first,))]
    change = draw(st.sampled_from(["none", "moved", "left out", "twice", "exchanged"]))
    k = draw(st.integers(0, len(pieces) - 1))
    if change == "moved":
        pieces[k] = pieces[k]._replace(start=tuple(max(0, at - 1) for at in pieces[k].start))
    elif change == "exchanged":
        pieces[k] = draw(pieces_of(shape))
    elif change != "none":
        pieces[k : k + 1] = [pieces[k]] * (2 if change == "twice" else 0)
    return shape, draw(st.permutations(pieces))


@given(partitions())
def test_cuts_that_make_a_whole_or_nearly_do(drawn):
    shape, pieces = drawn
    marks = np.zeros(shape, int)
    for piece in pieces:
        view = marks.reshape(-1) if piece.is_run else marks
        view[tuple(slice(at, at + n) for at, n in zip(piece.start, piece.own, strict=True))] += 1
    assert make_whole(pieces) == bool(pieces and (marks == 1).all())


def test_a_whole_that_no_memory_holds():
    """Neither what makes a whole nor what two pieces have in common takes memory in proportion to it."""
    shape = (1 << 25, 3, 1 << 25)
    half = 1 << 24
    columns = [Piece(shape, (0, 0, 0), (1 << 25, 3, half)), Piece(shape, (0, 0, half), (1 << 25, 3, half))]
    assert make_whole(columns)
    assert not make_whole([columns[0], columns[0]])
    run = Piece(shape, ((1 << 25) * 3 * 7 + half - 2,), (4,))
    found = np.zeros(4)
    box = Piece(shape, (7, 0, half), (1, 2, 5))
    assert copy_common(np.arange(10.0).reshape(1, 2, 5), box, found, run) == 2
    np.testing.assert_array_equal(found, [0, 0, 0, 1])
    upper = Piece(shape, (0,), ((1 << 50) * 3 // 2 + 5,))
    lower = Piece(shape, (upper.own[0],), ((1 << 50) * 3 - upper.own[0],))
    assert make_whole([upper, lower])


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (1, 4096), (4096, 1), (2, 2048)])
def test_many_boxes(rows, columns):
    """Also with a run among them."""
    shape = (rows * 3, columns * 5, 2)
    boxes = [Piece(shape, (3 * i, 5 * k, 0), (3, 5, 2)) for i in range(rows) for k in range(columns)]
    assert make_whole(boxes)
    assert not make_whole([*boxes[:-1], boxes[0]])
    box = boxes.pop()
    runs = [Piece(shape, (10 * columns * (3 * rows - k) - 10,), (10,)) for k in range(3)]
    assert make_whole([*boxes, *runs])
    assert not make_whole([*boxes, *runs[:2], runs[0]])
    assert not make_whole([*boxes, *runs, box])


@pytest.mark.parametrize("cut_at", [1, 2, 4])
def test_boxes_that_make_a_whole(cut_at):
    boxes = [
        Piece((5, 6), (0, 0), (2, cut_at)),
        Piece((5, 6), (0, cut_at), (2, 6 - cut_at)),
        Piece((5, 6), (2, 0), (3, 6)),
    ]
    assert make_whole(boxes)
    assert not make_whole(boxes[1:])
    assert not make_whole([boxes[0]._replace(start=(1, 0)), *boxes[1:]])


@pytest.mark.parametrize(
    "piece",
    [
        Piece((4, 3), (2, 0), (3, 3)), Piece((4, 3), (-1, 0), (1, 3)), Piece((4, 3), (8,), (5,)), Piece((4, 3), (0, 0), (4,)),
        Piece((4, 3), (0, 0, 0), (1, 1, 1)), Piece((), (1,), (1,)),
    ],
    ids=str,
)  # fmt: skip
def test_pieces_that_cannot_be(piece):
    assert piece.fault()
