"""The documented recipe finds the known minima of standard test functions."""

import numpy as np
import pytest
import scipy.optimize

from adamw_numba import multistart
from benchmarks.minima import is_found, recipe, starts, with_gradient
from benchmarks.problems import PROBLEMS

BADLY_SCALED = {"Powell badly scaled", "Brown badly scaled", "Meyer"}  # docs/minimize.md says so
# Found as well (`python -m benchmarks.minima`), and left out here to save time.
LEFT_OUT = {"Biggs EXP6", "Trigonometric", "Variably dimensioned", "Discrete boundary value", "Griewank", "Zakharov"}
LEFT_OUT |= {"Dixon and Price", "Linear, full rank", "Sphere"}
EVALUATIONS = 20_001  # of each start
QUICK = {"Rosenbrock", "Himmelblau", "Rastrigin"}  # each function compiles a loop of its own
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(set(PROBLEMS) - BADLY_SCALED - LEFT_OUT)
]


@pytest.mark.parametrize("name", NAMES)
def test_minimum_is_found(name):
    problem = PROBLEMS[name]
    function = with_gradient(problem.make)
    x0 = np.array(problem.x0, float)
    numerical = scipy.optimize.approx_fprime(x0, lambda x: function(x)[0])
    np.testing.assert_allclose(function(x0)[1], numerical, rtol=1e-4, atol=1e-5 * (1 + np.abs(numerical).max()))
    best = multistart(function, starts(problem), jac=True, **recipe(problem))
    assert is_found(best.fun, problem), (best.fun, problem.minimum)
    assert best.fun > problem.minimum - 1e-6 * max(1, abs(problem.minimum))
    assert all(result.nfev <= EVALUATIONS for result in best.results)
