"""Dask arrays: the state has the chunks of its variable, and a step computes nothing by itself."""

import numpy as np
import pytest

from adamw_numba import AdamW

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")


def moments(optimizer):
    return [array for name, array in optimizer.state.items() if "/" in name]


@pytest.mark.parametrize("options", [{}, {"use_ema": True, "amsgrad": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_state_is_chunked_like_the_variable(options, dtype):
    variable = da.ones((7, 4), chunks=(3, 2), dtype=dtype)
    optimizer = AdamW(**options)
    optimizer.build([variable])
    assert all(array.chunks == variable.chunks for array in moments(optimizer))
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    assert all(array.chunks == variable.chunks for array in moments(optimizer))


def test_a_graph_that_is_persisted_does_not_grow():
    variables, expected = [da.ones(10, chunks=4)], [np.ones(10)]
    optimizer, other = AdamW(0.1), AdamW(0.1)
    optimizer.build(variables)
    other.build(expected)
    state, sizes = optimizer.variables, []
    for _ in range(4):
        variables, state = optimizer.stateless_apply(state, [da.ones(10, chunks=4)], variables)
        variables, state = dask.persist(variables, state)
        other.apply([np.ones(10)])
        sizes.append(len(variables[0].__dask_graph__()))
    assert len(set(sizes)) == 1
    assert variables[0].chunks == ((4, 4, 2),)
    np.testing.assert_allclose(variables[0].compute(), expected[0], rtol=1e-12)
