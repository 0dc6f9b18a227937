"""Numbers below the smallest normal one: they cost nothing, change nothing that can be seen, and stay everybody else's."""

import platform

import numpy as np
import pytest
from helpers.oracle import Oracle
from numba import njit

from adamw_numba import AdamW, minimize

FLUSHED = platform.machine() in ("x86_64", "AMD64")
OPTIONS = {
    "plain": {},
    "everything": {"amsgrad": True, "use_ema": True, "clipvalue": 1.0, "loss_scale_factor": 2.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clip": {"global_clipnorm": 1.0},
}


def are_subnormal(array):
    return (array != 0) & (np.abs(array) < np.finfo(array.dtype).tiny)


@pytest.mark.parametrize(
    ("options", "scales"),
    [(options, (0.0, 1e-20, 1e-42)) for options in OPTIONS] + [("clip", (scale,)) for scale in (0.0, 1e-20, 1e-42)],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_that_vanish(dtype, options, scales):
    """A row of a table that is never looked up again, a saturated unit; the norm of all of them vanishes, too."""
    random = np.random.default_rng(0)
    steps = 900 if dtype == "float32" else 7000
    scales = np.repeat(scales, 50) * (1 if dtype == "float32" else 1e-270)
    variable = random.normal(size=scales.size).astype(dtype)
    optimizer, oracle = AdamW(**OPTIONS[options]), Oracle(**OPTIONS[options])
    oracle.build([variable])
    optimizer.build([variable])
    for number in range(steps):
        gradient = (random.normal(size=scales.size) * (1.0 if number < 2 else scales)).astype(dtype)
        optimizer.apply([gradient])
        oracle.step([gradient])
    expected = oracle.variables[0]
    np.testing.assert_allclose(variable, expected, rtol=1e-4 if dtype == "float32" else 1e-11)
    if FLUSHED:
        assert not any(are_subnormal(array).any() for array in optimizer.variables if array.ndim)
    halved = np.full(1000, np.finfo(dtype).tiny, dtype) * np.array(0.5, dtype)
    assert are_subnormal(halved).all()  # the modes of this thread are what they were


@pytest.mark.parametrize("epsilon", [1e-300, 1e-45, 1e-38])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_division_by_zero(dtype, epsilon):
    variable = np.array([1.0, 2.0, -3.0], dtype)
    optimizer = AdamW(0.1, weight_decay=0.0, epsilon=epsilon)
    optimizer.build([variable])
    for _ in range(3):
        optimizer.apply([np.zeros(3, dtype)])
    assert variable.tolist() == [1.0, 2.0, -3.0]


@njit
def vanishing(x, scale):
    gradient = scale * x
    return 0.5 * scale * (x**2).sum(), gradient


@pytest.mark.parametrize("scale", [1e-160, 1e-308, 1e-312])
def test_both_loops_of_a_minimization(scale):
    keywords = {"args": (scale,), "jac": True, "maxiter": 60, "gtol": None, "use_ema": True}
    results = [minimize(vanishing, np.linspace(-1, 1, 21), compiled=compiled, **keywords) for compiled in (True, False)]
    np.testing.assert_array_equal(results[0].x, results[1].x)
    for key, array in results[0].state.items():
        np.testing.assert_array_equal(array, results[1].state[key], err_msg=key)
        assert not (FLUSHED and key.startswith(("momentum", "velocity")) and are_subnormal(np.asarray(array)).any())


@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        ("float64", 1.7e308, {"global_clipnorm": 1.0}),
        ("float64", 1.7e308, {"clipnorm": 1.0}),
        ("float32", 3e38, {"global_clipnorm": 1.0}),
        ("float32", 3e38, {"clipnorm": 1.0}),
        ("float32", 1e30, {"global_clipnorm": 1e-4, "loss_scale_factor": 2.0**20}),
    ],
)
def test_huge_gradients_are_clipped(dtype, size, options):
    """By a factor that is itself subnormal, or nearly so: Adam's first step is the learning rate, whatever the size."""
    variables = [np.ones(4, dtype), np.ones(3, dtype)]
    optimizer = AdamW(0.1, weight_decay=0.0, epsilon=1e-12, **options)
    optimizer.build(variables)
    optimizer.apply([np.full(4, size, dtype), np.full(3, -size, dtype)])
    np.testing.assert_allclose(variables[0], 0.9, rtol=1e-5)
    np.testing.assert_allclose(variables[1], 1.1, rtol=1e-5)
