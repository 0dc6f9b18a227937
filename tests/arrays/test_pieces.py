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
