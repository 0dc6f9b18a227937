"""`jac="jax"`: the function is traced once, and whatever cannot be traced is differentiated all the same."""

import numpy as np
import pytest
from helpers.libraries import jnp

from adamw_numba import minimize

pytest.importorskip("jax")
START = np.array([1.0, -2.0])
OPTIONS = {"jac": "jax", "maxiter": 30, "learning_rate": 0.1, "gtol": None}


def by_hand(x, a, batch=0.0):
    return ((x - a - batch) ** 2).sum(), 2 * (x - a - batch)


# What is given besides x: keywords, and how often the function is traced
DATA = np.array([3.0, 0.5])
CASES = {
    "nothing": ({}, lambda x: ((x - 3) ** 2).sum(), 1),
    "an array": ({"args": (DATA,)}, lambda x, a: ((x - a) ** 2).sum(), 1),
    "a number and a text": ({"args": (2, "square")}, lambda x, a, b: ((x - 3) ** a).sum(), 1),
    "a dict": ({"args": ({"a": DATA, "p": 2},)}, lambda x, a: ((x - a["a"]) ** a["p"]).sum(), 1),
    "batches": ({"batches": [DATA, DATA + 1]}, lambda x, a: ((x - a) ** 2).sum(), 1),
    "batches of numbers": ({"batches": [3.0, 4.0]}, lambda x, a: ((x - a) ** 2).sum(), None),
    "a branch on a value": ({}, lambda x: ((x - 3) ** 2).sum() if x[0] < 100 else x[0], None),
    "float32": ({"x0": START.astype(np.float32)}, lambda x: ((x - 3) ** 2).sum(), 1),
    "nested": ({"x0": {"a": START, "b": np.array(2.0)}}, lambda x: ((x["a"] - x["b"]) ** 2).sum(), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_with_one_trace(case):
    keywords, fun, traces = CASES[case]
    count = []

    def counted(x, *args):
        count.append(1)
        return fun(x, *args)

    found = minimize(counted, **{"x0": START} | OPTIONS | keywords)
    assert len(count) == traces if traces else len(count) > 1
    plain = minimize(fun, **{"x0": START} | OPTIONS | keywords | {"jac": lambda x, *a: _gradient(fun, x, *a)})
    for name in ("x", "jac"):
        one, other = found[name], plain[name]
        pairs = [(one[k], other[k]) for k in one] if isinstance(one, dict) else [(one, other)]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _gradient(fun, x, *args):
    import jax

    is_double = "float64" in {leaf.dtype.name for leaf in jax.tree.leaves(x)}
    with jax.enable_x64(is_double):
        gradient = jax.grad(fun)(jax.tree.map(jnp.asarray, x), *args)
        return jax.tree.map(np.asarray, gradient)


def test_errors_of_the_function_are_raised():
    def fails(x):
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        minimize(fails, START, jac="jax")
