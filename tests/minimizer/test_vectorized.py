"""`multistart(vectorized=True)`: one call for all starts, and the result that each would have alone."""

import numpy as np
import pytest
from helpers.libraries import jnp, torch
from helpers.results import assert_equal

from adamw_numba import minimize, multistart

STARTS = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [-3.0, 4.0, 0.5], [9.0, 9.0, 9.0]])
DATA = np.array([1.0, 2.0, 3.0])
OPTIONS = {"jac": True, "maxiter": 150, "gtol": 1e-3}


def together(x, factor=1.0):
    assert x.ndim == 2
    return alone(x, factor)


def alone(x, factor=1.0):
    z = x - DATA
    return factor * (z**4 + z**2).sum(axis=-1), factor * (4 * z**3 + 2 * z)


CASES = {
    "plain": {},
    "a rate": {"learning_rate": 0.1},
    "bounds": {"bounds": [(-5, 2.5), (0, 1), (None, None)]},
    "units": {"x_scale": [1.0, 2.0, 3.0]},
    "arguments": {"args": (0.5,)},
    "the ordinary options": {"use_ema": True, "amsgrad": True, "ftol": 1e-8, "patience": 30, "history": 20},
    "batches": {"batches": [0.5, 1.0], "learning_rate": 0.1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("apart", [True, False])
def test_each_start_has_its_own_result(case, apart):
    options = OPTIONS | CASES[case]
    fun = together
    if apart:
        options["jac"] = lambda x, *args: together(x, *args)[1]
        fun = lambda x, *args: together(x, *args)[0]  # noqa: E731
    best = multistart(fun, STARTS, vectorized=True, **options)
    singles = [minimize(alone, x, **options | {"jac": True}, compiled=False) for x in STARTS]
    singles.sort(key=lambda result: result.fun)
    for one, other in zip(best.results, singles, strict=True):
        assert_equal(one, other)
    assert best.fun == singles[0].fun


def test_one_call_for_all_that_go_on():
    counts = []

    def fun(x):
        counts.append(len(x))
        return together(x)

    best = multistart(fun, STARTS, vectorized=True, **OPTIONS)
    assert counts[0] == len(STARTS)
    assert sorted(counts, reverse=True) == counts
    assert len(counts) == max(result.nfev for result in best.results)
    assert sum(counts) == sum(result.nfev for result in best.results)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("own", [True, False])
def test_other_libraries(library, own):
    pytest.importorskip(library)
    xp = torch if library == "torch" else jnp
    shapes = []

    def fun(x):
        shapes.append(x.shape)
        z = x - xp.asarray(DATA, dtype=x.dtype)
        return (z**4 + z**2).sum(axis=-1)

    starts = [xp.asarray(x, dtype=xp.float32) for x in STARTS] if own else STARTS
    best = multistart(fun, starts, jac=library, vectorized=True, maxiter=300)
    for result in best.results:
        np.testing.assert_allclose(np.asarray(result.x), DATA, atol=1e-3)
        assert isinstance(result.x, type(starts[0]))
    if library == "jax":
        assert shapes == [(4, 3)]  # traced once


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_batches_and_arguments_of_other_libraries(library):
    pytest.importorskip(library)
    traces = []

    def fun(x, batch, factor):
        traces.append(1)
        return factor * ((x - batch) ** 2).sum(axis=-1)

    xp = torch if library == "torch" else jnp
    batches = [xp.asarray(DATA), xp.asarray(DATA + 1)] if library == "torch" else [DATA, DATA + 1]
    options = {"jac": library, "batches": batches, "args": (2.0,), "maxiter": 40, "learning_rate": 0.1, "gtol": None}
    best = multistart(fun, STARTS, vectorized=True, **options)
    if library == "jax":
        assert len(traces) == 1
    singles = [minimize(fun, x, **options, compiled=False).x for x in STARTS]
    singles.sort(key=lambda x: abs(x - best.results[0].x).sum())
    np.testing.assert_allclose(best.results[0].x, singles[0], rtol=1e-6)


def test_a_function_that_does_not_depend_on_x():
    pytest.importorskip("torch")
    with pytest.raises(TypeError, match="depend on x through torch"):
        multistart(lambda x: np.zeros(len(x)), STARTS, jac="torch", vectorized=True)


def test_a_callback_for_each():
    seen = []
    multistart(together, STARTS[:2], vectorized=True, callback=lambda x: seen.append(x[0]), **OPTIONS | {"maxiter": 3})
    assert len(seen) == 6


WRONG = {
    "differences": ({"jac": None}, "`jac`"),
    "values of another shape": ({"fun": lambda x: (0.0, x)}, "one for each start"),
    "one value too many": ({"fun": lambda x: (np.zeros(len(x) + 1), x)}, "one for each start"),
    "gradients of another shape": ({"fun": lambda x: (np.zeros(len(x)), x[0])}, "gradient"),
    "no pair": ({"fun": lambda x: np.zeros(len(x))}, r"expected \(values, gradients\)"),
    "different starts": ({"x0s": [np.zeros(2), np.zeros(3)]}, "`vectorized`"),
    "odd flags": ({"vectorized": np.ones(2)}, "`vectorized`"),
    "polish": ({"polish": True}, "`polish`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case):
    options, words = WRONG[case]
    keywords = {"fun": together, "x0s": STARTS, "vectorized": True} | OPTIONS | options
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        multistart(**keywords)
    assert len(str(raised.value)) < 600
