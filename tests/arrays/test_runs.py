"""The runs of a work list visit every element of every array once: compared with NumPy's own walk."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba.arrays import Layout
from adamw_numba.arrays.runs import ARRAY, CHUNK, COUNT, G_AT, P_AT, P_STEP, S_AT, S_STEP, chunks_of, runs_by_kind

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)


def laid_out(draw, shape, dtype):
    """A layout that steps over the elements of a shape in any order of the axes, with gaps, backwards."""
    stride, strides = np.dtype(dtype).itemsize, [0] * len(shape)
    for axis in draw(st.permutations(range(len(shape)))):
        strides[axis] = stride * draw(st.sampled_from([1, 2, -1]))
        stride = abs(strides[axis]) * max(shape[axis], 1)
    return Layout(0, shape, tuple(strides), dtype)


@st.composite
def triples(draw):
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(["float32", "complex64"]))
    return tuple(laid_out(draw, shape, dtype) for _ in range(3))


def elements(layouts):
    """Where each element of three arrays lies, in real numbers."""
    parts = (0, 4) if layouts[0].dtype.startswith("complex") else (0,)
    indices = itertools.product(*map(range, layouts[0].shape))
    return sorted(
        tuple(sum(i * s for i, s in zip(index, layout.strides, strict=True)) + part for layout in layouts)
        for index in indices
        for part in parts
    )


def visited(work, i):
    rows = work[work[:, ARRAY] == i].tolist()
    return sorted(
        tuple(at + k * step for at, step in zip(row[P_AT : S_AT + 1], row[P_STEP : S_STEP + 1], strict=True))
        for row in rows
        for k in range(row[COUNT])
    )


@given(st.lists(triples(), max_size=5))
def test_every_element_once(layouts):
    found = runs_by_kind([2 * i for i in range(len(layouts))], layouts)
    for work in (found, {kind: chunks_of(runs) for kind, runs in found.items()}):
        for i, each in enumerate(layouts):
            rows = [visited(own, 2 * i) for own in work.values()]
            assert sorted(itertools.chain(*rows)) == elements(each)
        assert all((np.diff(own[:, ARRAY]) >= 0).all() for own in work.values())  # in the order of the variables


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("step", [4, 12, -4])
def test_chunks(count, step):
    layouts = [Layout(0, (size,), (step,), "float32") for size in (count, 7, count)]
    (runs,) = runs_by_kind(range(3), [(each, each, each) for each in layouts]).values()
    work = chunks_of(runs)
    assert work[:, COUNT].max() <= CHUNK
    for i, size in enumerate((count, 7, count)):
        rows = work[work[:, ARRAY] == i]
        positions = np.concatenate([row[P_AT] + step * np.arange(row[COUNT]) for row in rows])
        np.testing.assert_array_equal(positions, step * np.arange(size))
        np.testing.assert_array_equal(rows[:, P_AT], rows[:, G_AT])
        assert len(rows) == -(-size // CHUNK)
