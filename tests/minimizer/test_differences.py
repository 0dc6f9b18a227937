"""Finite differences: which steps, how many evaluations, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
from helpers.libraries import torch
from scipy.optimize import approx_fprime, rosen, rosen_der

from adamw_numba import minimize, multistart

START = np.array([-1.2, 1.0, 0.7])


def never(x):
    pytest.fail("called")


# Steps


@pytest.mark.parametrize("jac", ["2-point", "3-point"])
@pytest.mark.parametrize("option", ["finite_diff_rel_step", "eps"])
@pytest.mark.parametrize("step", [1e-4, [1e-3, 1e-4, 1e-5]])
def test_the_gradient_is_that_of_scipy(jac, option, step):
    result = minimize(rosen, START, jac=jac, maxiter=0, **{option: step})
    key = "rel_step" if option == "finite_diff_rel_step" else "abs_step"
    theirs = scipy.optimize._numdiff.approx_derivative(rosen, START, method=jac, **{key: np.asarray(step)})
    np.testing.assert_array_equal(result.jac, theirs)


def test_a_step_for_each_element_where_one_is_fixed():
    bounds = [(-2, 2), (1, 1), (-2, 2)]
    steps = np.array([1e-3, 0.5, 1e-5])
    result = minimize(rosen, START, jac="2-point", bounds=bounds, finite_diff_rel_step=steps, maxiter=0)
    theirs = scipy.optimize._numdiff.approx_derivative(
        lambda x: rosen([x[0], 1.0, x[1]]), START[[0, 2]], method="2-point", rel_step=steps[[0, 2]]
    )
    np.testing.assert_array_equal(result.jac[[0, 2]], theirs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.01}, {"return_best": False, "learning_rate": 0.01}])
def test_what_is_fixed_has_no_derivative(compiled, options):
    bounds = [(-2, 2), (1, 1), (-2, 2)]
    result = minimize(rosen, START, bounds=bounds, maxiter=200, compiled=compiled, **options)
    assert np.isnan(result.jac).tolist() == [False, True, False]
    assert np.isfinite(result.history["gradient_norm"]).all()
    assert result.x[1] == 1


WRONG = {
    "a word": ({"finite_diff_rel_step": "x"}, "finite_diff_rel_step"),
    "another length": ({"finite_diff_rel_step": [1e-3, 1e-3]}, "finite_diff_rel_step"),
    "NaN": ({"finite_diff_rel_step": np.nan}, "finite_diff_rel_step"),
    "infinity": ({"eps": [1e-3, np.inf, 1e-3]}, "eps"),
    "a dict": ({"eps": {}}, "eps"),
    "both": ({"eps": 1e-3, "finite_diff_rel_step": 1e-3}, "one of them"),
    "workers a word": ({"workers": "two"}, "workers"),
    "workers none": ({"workers": 0}, "workers"),
    "workers half": ({"workers": 1.5}, "workers"),
    "workers a flag": ({"workers": True}, "workers"),
    "workers a huge number": ({"workers": 10**400}, "workers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_the_function_is_called(case):
    options, words = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        minimize(never, START, **options)
    assert "expected" in str(raised.value)


def test_processes_need_a_function_that_can_be_sent():
    with pytest.raises(TypeError, match="`workers` asks for processes"):
        minimize(lambda x: rosen(x), START, workers=2)


@pytest.mark.parametrize("workers", [None, map, lambda function, items: list(map(function, items))])
def test_a_type_error_of_the_function_is_not_hidden(workers):
    def fun(x):
        if (x != START).any():
            raise TypeError("my own")
        return rosen(x)

    with pytest.raises(TypeError, match="my own"):
        minimize(fun, START, workers=workers)


@pytest.mark.parametrize("workers", ["two", 0, 1.5, True, 10**400])
def test_refused_by_multistart(workers):
    with pytest.raises(ValueError, match="workers"):
        multistart(never, [START], workers=workers)


# Evaluations


@pytest.mark.parametrize("jac", ["2-point", "3-point", "cs"])
@pytest.mark.parametrize("bounds", [None, [(-1.2, 2), (1, 1), (-2, 0.7)]])
@pytest.mark.parametrize("compiled", [True, False])
def test_no_more_evaluations_than_allowed(jac, bounds, compiled):
    least = minimize(_analytic, START, jac=jac, bounds=bounds, maxiter=0).nfev
    for most in range(least, least + 25):
        calls = []
        options = {"jac": jac, "bounds": bounds, "maxfev": most, "compiled": compiled, "gtol": None}
        result = minimize(lambda x, calls=calls: calls.append(1) or _analytic(x), START, **options)
        assert len(calls) == result.nfev
        assert most - least < result.nfev <= most
        assert result.status == 2


def _analytic(x):
    return ((x[0] - 1) ** 2 + x[1] * x[2] ** 2 + x[1] ** 4) * 1.0


# Precision


def single(x):
    return np.float32(np.sum((np.asarray(x, np.float32) - 3) ** 2))


ROUNDED = {
    "a NumPy number": single,
    "an array of NumPy": lambda x: np.asarray(single(x)),
    "a tensor": lambda x: ((torch.tensor(x, dtype=torch.float32) - 3) ** 2).sum(),
}


@pytest.mark.parametrize("case", ROUNDED)
@pytest.mark.parametrize("jac", ["2-point", "3-point"])
def test_a_function_that_computes_in_single_precision(case, jac):
    if case == "a tensor":
        pytest.importorskip("torch")
    result = minimize(ROUNDED[case], np.zeros(2), jac=jac, gtol=1e-2)
    assert result.nit > 0
    np.testing.assert_allclose(result.x, 3, atol=0.02)


def test_a_warning_where_no_difference_is_seen():
    def hidden(x):  # rounded, and the value does not tell
        return float(single(x))

    with pytest.warns(RuntimeWarning, match="finite differences of `fun` are exactly 0") as caught:
        result = minimize(hidden, np.zeros(2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.nit == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        larger = minimize(hidden, np.zeros(2), eps=1e-2, gtol=0.1)
    np.testing.assert_allclose(larger.x, 3, atol=0.1)


@pytest.mark.parametrize("jac", ["2-point", "3-point", "cs"])
@pytest.mark.parametrize("step", [None, 1e-3])
def test_arrays_keep_their_own_dtypes(jac, step):
    x0 = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([0.5])}
    seen = []

    def fun(x):
        seen.append((x["a"].dtype.name, x["b"].dtype.name))
        return ((x["a"] - 3) ** 2).sum() + ((x["b"] - 1) ** 2).sum()

    result = minimize(fun, x0, jac=jac, finite_diff_rel_step=step, maxiter=0)
    expected = ("complex64", "complex128") if jac == "cs" else ("float32", "float64")
    assert set(seen) - {("float32", "float64")} <= {expected}
    rtol = 1e-3 if step is None else 1e-2
    np.testing.assert_allclose(result.jac["a"], 2 * (x0["a"] - 3), rtol=rtol)
    np.testing.assert_allclose(result.jac["b"], 2 * (x0["b"] - 1), rtol=rtol)


def test_eps_is_a_step_here():
    with pytest.warns(Warning, match="`epsilon`"):
        minimize(lambda x: (rosen(x), rosen_der(x)), START, jac=True, eps=1e-8, maxiter=1)
    np.testing.assert_allclose(minimize(rosen, START, eps=1e-7, maxiter=0).jac, approx_fprime(START, rosen, 1e-7))
    assert math.isfinite(minimize(rosen, START, eps=1e-7, maxiter=3).fun)
