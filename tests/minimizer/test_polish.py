"""`polish`: SciPy's L-BFGS-B goes on from AdamW's best point."""

import re

import numba
import numpy as np
import pytest
import scipy.optimize
from helpers.libraries import torch
from scipy.optimize import rosen, rosen_der

from adamw_numba import minimize, multistart

START = np.array([-1.2, 1.0, 0.7])
SHORT = {"jac": True, "maxiter": 60}


def valley(x):
    return rosen(x), rosen_der(x)


CASES = {
    "True": {"polish": True},
    "its name": {"polish": "L-BFGS-B"},
    "options": {"polish": {"maxcor": 5}},
    "a rate": {"polish": True, "learning_rate": 0.05},
    "units": {"polish": True, "x_scale": [2.0, 1.0, 0.5]},
    "bounds": {"polish": True, "bounds": [(-2, 0.5), (None, None), (-1, 3)]},
    "bounds and units": {"polish": True, "bounds": [(-2, 0.5), (None, None), (-1, 3)], "x_scale": [0.3, 0.7, 0.1]},
    "differences": {"polish": True, "jac": "3-point", "gtol": 1e-4},
    "the ordinary loop": {"polish": True, "compiled": False},
    "the last point": {"polish": True, "return_best": False},
}


@pytest.mark.parametrize("case", CASES)
def test_ends_where_l_bfgs_b_does(case):
    options = SHORT | CASES[case]
    fun = valley if options["jac"] is True else rosen
    calls = []
    result = minimize(lambda x: calls.append(1) or fun(x), START, **options)
    theirs = scipy.optimize.minimize(
        valley, START, jac=True, method="L-BFGS-B", bounds=options.get("bounds"), options={"ftol": 1e-15, "gtol": 1e-9}
    )
    assert result.success
    assert result.fun == pytest.approx(theirs.fun, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(result.x, theirs.x, atol=1e-3)
    assert result.nfev == len(calls)
    assert result.nit > 60
    history = result.history
    assert list(history["nit"]) == list(range(result.nit + 1))
    assert np.isnan(history["learning_rate"][61:]).all()
    np.testing.assert_array_equal(history["fun"][-1], result.fun_last)
    assert result.message.endswith(f"AdamW took 60 iterations, then L-BFGS-B {result.nit - 60}.")
    assert fun(result.x) == result.fun if options["jac"] != True else valley(result.x)[0] == result.fun  # noqa: E712


def test_what_the_gradient_needs_no_polish():
    result = minimize(valley, np.ones(3), jac=True, polish=True)
    assert result.nfev == 1
    assert "L-BFGS-B" not in result.message


def test_limits(monkeypatch):
    spent = minimize(valley, START, **SHORT, polish=True, maxfev=70)
    assert (spent.nfev, spent.status) == (70, 2)
    seen = []

    def stop(intermediate_result):
        seen.append(intermediate_result.nit)
        return len(seen) == 65

    stopped = minimize(valley, START, **SHORT, polish=True, callback=stop)
    assert (stopped.status, stopped.nit) == (99, 65)
    assert seen == list(range(1, 66))


def test_a_callback_that_stops_at_the_minimum():
    def stop(intermediate_result):
        return intermediate_result.nit > 60 and intermediate_result.gradient_norm <= 1e-5

    assert minimize(valley, START, **SHORT, polish=True, callback=stop).status == 99


def test_there_may_be_no_best_point():
    result = minimize(lambda x: (np.nan, x), START, jac=True, maxiter=3, nonfinite="propagate", polish=True)
    assert (result.status, result.nit) == (1, 3)


def test_an_error_in_the_second_stage_is_explained():
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) == 70:
            raise ZeroDivisionError
        return valley(x)

    with pytest.raises(ZeroDivisionError) as raised:
        minimize(fun, START, **SHORT, polish=True)
    assert raised.value.intermediate_result.nfev == 69
    assert "best value" in raised.value.__notes__[0]


def test_many_starts():
    @numba.njit
    def bowl(x):
        return ((x - 20) ** 4).sum(), 4 * (x - 20) ** 3

    best = multistart(bowl, np.array([[0.0, 1.0], [3.0, -50.0]]), jac=True, maxiter=30, polish=True, gtol=1e-8)
    for result in best.results:
        np.testing.assert_allclose(result.x, 20, atol=0.01)
        assert result.nit > 30


def test_float32_and_nested_arrays():
    def fun(x):
        a, b = x["a"] - 3, x["b"] - 40
        return (a**2).sum() + (b**2).sum() / 100, {"a": 2 * a, "b": b / 50}

    x0 = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(())}
    result = minimize(fun, x0, jac=True, maxiter=5, polish=True)
    np.testing.assert_allclose(result.x["a"], 3, rtol=1e-4)
    np.testing.assert_allclose(result.x["b"], 40, rtol=1e-4)
    assert (result.x["a"].dtype, result.x["a"].shape) == (np.float32, (2, 2))


REFUSED = {
    "a word": ({"polish": "BFGS"}, ValueError, "'L-BFGS-B'"),
    "a number": ({"polish": 3}, ValueError, "expected True"),
    "batches": ({"polish": True, "batches": [1, 2]}, ValueError, "noisy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as raised:
        minimize(lambda x: pytest.fail("called"), START, **options)
    assert "polish" in str(raised.value)


def test_other_libraries_are_refused():
    pytest.importorskip("torch")
    with pytest.raises(TypeError, match="`polish`"):
        minimize(lambda x: pytest.fail("called"), torch.ones(2), jac="torch", polish=True)


def two_exponentials(p):
    t = np.linspace(0, 10, 200)
    model = [p[0] * np.exp(-t / p[1]) + p[2] * np.exp(-t / p[3]) for p in (p, [5e4, 0.5, 8e2, 5.0])]
    return (((model[0] - model[1]) / 20) ** 2).mean()


@pytest.mark.parametrize("x_scale", [None, [1e4, 1, 1e3, 1]])
def test_no_success_where_its_line_search_gives_up(x_scale):
    """L-BFGS-B calls it convergence; far from the minimum the gradient says otherwise."""
    result = minimize(two_exponentials, [1e4, 1.0, 1e3, 3.0], maxiter=50, polish=True, x_scale=x_scale)
    assert result.success == (np.abs(result.jac).max() <= 1e-5)
    assert result.success or re.search(r"then L-BFGS-B \d+: CONVERGENCE", result.message)
    assert (result.fun < 1e-6) == (x_scale is not None)
