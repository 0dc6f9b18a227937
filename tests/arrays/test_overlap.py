"""Which arrays have memory in common, compared with a set of bytes for each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba import AdamW
from adamw_numba.arrays.overlap import covered, overlapping, touching

EXTENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=12)


def ends(extents):
    lows = np.array([low for low, _ in extents], np.int64)
    return lows, lows + np.array([size for _, size in extents], np.int64)


def bytes_of(extents):
    return [set(range(low, low + size)) for low, size in extents]


@given(EXTENTS)
def test_pairs(extents):
    every = bytes_of(extents)
    expected = {(i, k) for i in range(len(every)) for k in range(i) if every[i] & every[k]}
    assert {(max(pair), min(pair)) for pair in overlapping(*ends(extents))} == expected


@given(EXTENTS, EXTENTS)
def test_ranges(extents, others):
    ranges = covered(*ends(extents))
    whole = set().union(*bytes_of(extents))
    assert set().union(*(range(low, high) for low, high in ranges.T)) == whole
    assert (ranges[0, 1:] >= ranges[1, :-1]).all()
    assert (ranges[0] < ranges[1]).all()
    expected = [k for k, each in enumerate(bytes_of(others)) if each & whole]
    assert touching(*ends(others), ranges).tolist() == expected


MEMORY = np.zeros((6, 8))
DISJOINT = {
    "rows": list(MEMORY),
    "columns": list(MEMORY.T),
    "backwards": [MEMORY[::-1, :4], MEMORY[:, 4:]],
    "interleaved, one large": [MEMORY.reshape(-1)[::2], *MEMORY.reshape(-1)[1::2, None]],
    "empty ones inside": [MEMORY, MEMORY[2:2], MEMORY[:, 3:3]],
}


@pytest.mark.parametrize("case", DISJOINT)
def test_variables_that_share_an_allocation(case):
    optimizer = AdamW()
    optimizer.build(DISJOINT[case])
    optimizer.apply([np.ones_like(variable) for variable in DISJOINT[case]])
    assert optimizer.iterations == 1


@pytest.mark.parametrize("where", [0, 17, 58])
def test_one_more_variable_that_overlaps_one_of_many(where):
    variables = [np.zeros(10) for _ in range(60)]
    variables.insert(0, variables[where][3:5])
    with pytest.raises(ValueError, match=rf"variable '0' and variable '{where + 1}' share memory"):
        AdamW().build(variables)
