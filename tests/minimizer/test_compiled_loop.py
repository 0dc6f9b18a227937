"""The compiled loop does what the ordinary loop does, bit for bit; and many starts at once."""

import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
import scipy.optimize
import torch
from helpers.results import assert_equal
from scipy.optimize import Bounds, rosen, rosen_der

from adamw_numba import minimize, multistart, schedules
from adamw_numba.minimizer import compiled_loop as loops

START = np.linspace(-1, 1, 5)
DATA = np.arange(12.0).reshape(3, 4)


@numba.njit
def valley(x, factor, data):
    value, gradient = data.sum() * 0, np.zeros_like(x)
    for i in range(x.size - 1):
        a, b = x[i + 1] - x[i] * x[i], 1 - x[i]
        value += factor * (100 * a * a + b * b)
        gradient[i] += factor * (-400 * a * x[i] - 2 * b)
        gradient[i + 1] += factor * 200 * a
    return value, gradient


@numba.njit
def fills(x, gradient, factor, data):
    value, found = valley(x, factor, data)
    for i in range(x.size):
        gradient[i] += found[i]
    return value


@numba.njit
def value_of(x, factor, data):
    return valley(x, factor, data)[0]


@numba.njit
def gradient_of(x, factor, data):
    return valley(x, factor, data)[1]


@numba.njit
def bowl(x):
    return ((x - 1) ** 2).sum(), 2 * (x - 1)


@pytest.fixture
def advanced(monkeypatch):
    """How often the compiled loop is entered."""
    calls = []
    advance = loops.Loop.advance
    monkeypatch.setattr(loops.Loop, "advance", lambda self, most: (calls.append(most), advance(self, most))[1])
    return calls


# Options that the compiled loop knows
OPTIONS = {
    "plain": {},
    "AMSGrad": {"amsgrad": True},
    "averages": {"use_ema": True, "ema_overwrite_frequency": 7},
    "global clip": {"global_clipnorm": 1.0},
    "clip by norm": {"clipnorm": 0.5},
    "clip by value": {"clipvalue": 0.1, "amsgrad": True, "use_ema": True},
    "schedule": {"learning_rate": schedules.CosineDecay(0.05, 500)},
    "function of the step": {"learning_rate": lambda step: 0.05 / (1 + step / 100)},
    "decay": {"weight_decay": 0.01},
    "schedule of the decay": {"weight_decay": schedules.ExponentialDecay(0.1, 100, 0.5)},
    "bounds": {"bounds": Bounds(-0.5, 0.7)},
    "fixed": {"bounds": [(0.3, 0.3)] + [(None, 2)] * 4},
    "gtol": {"gtol": 1.0},
    "ftol": {"ftol": 1e-4, "learning_rate": 0.01},
    "xtol": {"xtol": 0.02, "learning_rate": 0.01},
    "patience": {"patience": 5, "learning_rate": 0.3},
    "maxfev": {"maxfev": 33},
    "last point": {"return_best": False},
    "thin history": {"history": 30},
    "averages and more": {"use_ema": True, "global_clipnorm": 2.0, "bounds": Bounds(-0.5, 0.7), "weight_decay": 0.1},
}


IN_FLOAT32 = ["plain", "global clip", "bounds", "schedule", "patience"]
# Each of these options, and each dtype, has a kernel of its own, which is compiled first.
COMPILED = ["AMSGrad", "averages", "clip by value", "averages and more"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, np.float64, marks=[pytest.mark.slow] * (case in COMPILED)) for case in OPTIONS),
        *(pytest.param(case, np.float32, marks=pytest.mark.slow) for case in IN_FLOAT32),
    ],
)
def test_same_bits_as_the_ordinary_loop(case, dtype, advanced):
    keywords = {"args": (0.5, DATA), "jac": True, "maxiter": 300, "learning_rate": 0.05} | OPTIONS[case]
    compiled = minimize(valley, START.astype(dtype), **keywords)
    assert advanced
    assert compiled.x.dtype == dtype
    assert_equal(compiled, minimize(valley, START.astype(dtype), compiled=False, **keywords))


# Whole vectors, less, more, and arrays that are not padded: options with arrays of their own
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4, 8, 11, 513])
def test_same_bits_at_every_size(size, advanced):
    x0 = np.linspace(-1, 1, size)
    slots = {"clipvalue": 0.1, "amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 7}
    keywords = {"args": (0.5, DATA), "jac": True, "learning_rate": 0.05, "gtol": None, "callback_every": 13}
    for more in (slots, {"bounds": Bounds(-0.5, 0.7), "xtol": 1e-9, "global_clipnorm": 1.0}):
        seen, results = ([], []), []
        for compiled, xs in zip((True, False), seen, strict=True):
            options = {"maxiter": 60, "compiled": compiled, "callback": lambda xk, xs=xs: xs.append(xk)}
            results.append(minimize(valley, x0, **keywords, **options, **more))
        assert_equal(*results)
        np.testing.assert_array_equal(*seen)
    assert len(advanced) > 8


@numba.njit
def writes(x, factor, data):
    value = value_of(x, factor, data)
    x[:] = 100
    return value


# Forms of the objective: fun, jac, args
FORMS = {
    "fills the gradient": (fills, True, (0.5, DATA)),
    "two functions": (value_of, gradient_of, (0.5, DATA)),
    "two functions, one of which writes into x": (writes, gradient_of, (0.5, DATA)),
    "Fortran order": (valley, True, (0.5, np.asfortranarray(DATA))),
    "strided": (valley, True, (0.5, DATA[::2, ::-1])),
    "integers": (valley, True, (2, np.arange(6))),
    "NumPy scalars": (valley, True, (np.float64(0.5), DATA.astype(np.float32))),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_the_objective(case, advanced):
    fun, jac, args = FORMS[case]
    keywords = {"args": args, "jac": jac, "maxiter": 100, "learning_rate": 0.05}
    compiled = minimize(fun, START, **keywords)
    assert advanced
    assert_equal(compiled, minimize(fun, START, compiled=False, **keywords))


@numba.njit
def tilted(x):
    """Of two dimensions; the gradient is strided."""
    return (x[0] * x[1]).sum() + (x**2).sum(), (2 * x.T + x[::-1].T).T


@numba.njit
def of_integers(x):
    return np.abs(x).sum(), np.sign(x).astype(np.int64)


@numba.njit
def of_another_dimension(x):
    return x.sum(), np.ones(x.size)


def test_gradients_of_other_layouts_and_dtypes(advanced):
    for fun, shape in ((tilted, (2, 4)), (of_integers, (3, 2)), (of_integers, (5,))):
        x0, before = np.linspace(-1, 1.5, np.prod(shape)).reshape(shape), len(advanced)
        keywords = {"jac": True, "maxiter": 40, "learning_rate": 0.05}
        compiled = minimize(fun, x0, **keywords)
        assert len(advanced) > before
        assert compiled.fun < compiled.history["fun"][0]
        assert_equal(compiled, minimize(fun, x0, compiled=False, **keywords))
    with pytest.raises(ValueError, match=r"\(4,\); expected \(2, 2\)"):
        minimize(of_another_dimension, np.ones((2, 2)), jac=True)


# What needs Python at each step: keywords
PYTHON = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss scale": {"loss_scale_factor": 2.0},
    "skip": {"nonfinite": "skip"},
    "a rate of nothing": {"learning_rate": lambda: 0.01},
    "half precision": {"fun": lambda x, a, d: bowl(x.astype(np.float32)), "x0": START.astype(np.float16)},
}


@pytest.mark.parametrize("case", PYTHON)
def test_what_needs_python_falls_back(case, advanced):
    keywords = {"fun": valley, "x0": START, "args": (0.5, DATA), "jac": True, "maxiter": 30, "gtol": None}
    result = minimize(**keywords | PYTHON[case])
    assert not advanced
    assert result.nit == 30
    assert result.fun < result.history["fun"][0]


def test_norms_of_large_and_tiny_gradients_are_those_of_the_optimizer(advanced):
    """More than one chunk of a norm; and squares that vanish, which the compiled loop leaves to the optimizer."""
    for x0, scale in ((np.linspace(-1, 1, 40_000), 1.0), (np.linspace(-1, 1, 50), 1e-200)):
        keywords = {"args": (scale,), "jac": True, "maxiter": 20, "global_clipnorm": scale, "gtol": None}
        compiled = minimize(scaled, x0, **keywords)
        assert_equal(compiled, minimize(scaled, x0, compiled=False, **keywords))
    assert advanced


@numba.njit
def scaled(x, scale):
    return scale * (x**2).sum(), 2 * scale * x


def test_callbacks_and_both_doors(advanced):
    keywords = {"jac": True, "args": (0.5, DATA)}
    seen = {}
    for compiled in (True, False):
        for every in (1, 7):
            xs = seen[compiled, every] = []
            options = {"maxiter": 30, "learning_rate": 0.05, "callback_every": every, "compiled": compiled}
            minimize(valley, START, callback=lambda xk, xs=xs: xs.append(xk), **keywords, **options)
    for every, count in ((1, 30), (7, 5)):  # after 7, 14, 21, 28, and at the end
        assert len(seen[True, every]) == count
        np.testing.assert_array_equal(seen[True, every], seen[False, every])
    options = {"maxiter": 30, "learning_rate": 0.05}
    method = scipy.optimize.minimize(valley, START, method=minimize, options=options, **keywords)
    assert_equal(method, minimize(valley, START, **keywords, **options))
    assert len(advanced) > 35


@numba.njit
def cliff(x):
    if x[0] < 0.5:
        raise ValueError("off the cliff")
    return x[0], np.ones_like(x)


@numba.njit
def misshapen(x):
    return x[0], np.ones(x.size + 1)


@numba.njit
def hole(x):
    return (x[0] if x[0] > 0.5 else np.nan), np.ones_like(x)


@numba.njit
def pit(x):
    return x[0], np.ones_like(x) * (1 if x[0] > 0.5 else -np.nan)


def test_objectives_that_fail(advanced):
    with pytest.raises(ValueError, match="off the cliff") as caught:
        minimize(cliff, [1.0, 2.0], jac=True, learning_rate=0.1)
    assert 0.5 <= caught.value.intermediate_result.fun < 0.6
    with pytest.raises(ValueError, match=r"\(3,\); expected \(2,\)"):
        minimize(misshapen, [1.0, 2.0], jac=True)
    for fun in (hole, pit):
        results = [minimize(fun, [1.0], jac=True, learning_rate=0.1, compiled=c) for c in (True, False)]
        assert results[0].status == 3
        assert_equal(*results)
    assert advanced


def test_arguments_are_read_where_they_lie(advanced):
    """An array that changes between blocks is seen, as in the ordinary loop."""
    target = np.zeros(2)

    def move(intermediate_result):
        if intermediate_result.nit == 50:
            target[:] = 5

    for compiled in (True, False):
        target[:] = 0
        result = minimize(
            toward, np.ones(2), (target,), jac=True, callback=move, learning_rate=0.1, gtol=None, maxiter=600,
            compiled=compiled, return_best=False,
        )  # fmt: skip
        np.testing.assert_allclose(result.x, 5, atol=1e-3)
    assert advanced


@numba.njit
def toward(x, target):
    return ((x - target) ** 2).sum(), 2 * (x - target)


def test_a_second_run_compiles_nothing(monkeypatch):
    keywords = {"args": (0.5, DATA), "jac": True, "maxiter": 50}
    first = minimize(valley, START, **keywords)

    def refuse(*args, **kwargs):
        raise AssertionError("compiled something")

    monkeypatch.setattr("numba.core.compiler.Compiler.__init__", refuse)
    assert_equal(minimize(valley, START, **keywords), first)


@pytest.mark.parametrize("zero", [-0.0, 0.0])
def test_the_sign_of_a_zero_at_a_bound(zero, advanced):
    for bounds in (Bounds(zero, 5), Bounds(-5, zero)):
        keywords = {"jac": True, "bounds": bounds, "learning_rate": 0.0, "maxiter": 2, "gtol": None}
        for x0 in ([-0.0, 0.0], [-1.0, 1.0]):
            results = [minimize(bowl, x0, compiled=compiled, **keywords).x_last for compiled in (True, False)]
            np.testing.assert_array_equal(*map(np.signbit, results))
    assert advanced


TARGET = 1.0


def test_a_recompiled_objective_is_seen(monkeypatch, advanced):
    @numba.njit
    def moving(x):
        return ((x - TARGET) ** 2).sum(), 2 * (x - TARGET)

    keywords = {"x0": np.zeros(2), "jac": True, "maxiter": 50, "learning_rate": 0.1}
    first = minimize(moving, **keywords)
    monkeypatch.setitem(globals(), "TARGET", -1.0)
    moving.recompile()
    assert_equal(minimize(moving, **keywords), minimize(moving, compiled=False, **keywords))
    assert first.x[0] > 0 > minimize(moving, **keywords).x[0]
    assert advanced


PARALLEL = """
import numba, numpy as np
from adamw_numba import multistart
numba.config.THREADING_LAYER = "workqueue"
@numba.njit(parallel=True)
def fun(x):
    value = 0.0
    for i in numba.prange(x.size):
        value += x[i] ** 2
    return value, 2 * x
best = multistart(fun, np.linspace(-1, 1, 2000 * 4).reshape(2000, 4), jac=True, maxiter=5)
print(len(best.results), numba.threading_layer())
"""


@pytest.mark.slow
def test_many_starts_of_a_parallel_objective():
    done = subprocess.run([sys.executable, "-c", PARALLEL], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["2000", "workqueue"], done.stderr


STARTS = np.random.default_rng(0).normal(size=(40, 5))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"bounds": Bounds(-2, 2), "amsgrad": True, "patience": 50}, marks=pytest.mark.slow)],
    ids=["plain", "AMSGrad"],
)
def test_many_starts_are_each_as_alone(options, advanced):
    keywords = {"args": (1.0, DATA), "jac": True, "learning_rate": 0.05, "maxiter": 400} | options
    best = multistart(valley, STARTS, **keywords)
    assert advanced
    alone = sorted((minimize(valley, x0, **keywords) for x0 in STARTS), key=lambda result: result.fun)
    assert len(best.results) == 40
    for ours, one in zip(best.results, alone, strict=True):
        assert_equal(ours, one)
    assert best.fun == alone[0].fun
    ordinary = multistart(valley, STARTS[:3], compiled=False, **keywords)
    assert [r.fun for r in ordinary.results] == sorted(minimize(valley, x0, **keywords).fun for x0 in STARTS[:3])


def test_starts_from_several_threads():
    keywords = {"args": (1.0, DATA), "jac": True, "maxiter": 300}
    expected = multistart(valley, STARTS, **keywords)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(multistart(valley, STARTS, **keywords))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert [r.fun for r in result.results] == [r.fun for r in expected.results]


@numba.njit
def waves(x):
    return (np.cos(3 * x) + x**2 / 9).sum(), -3 * np.sin(3 * x) + 2 * x / 9


def test_sobol_starts():
    bounds = Bounds([-6, -4], [6, 5])
    best = multistart(waves, 20, jac=True, bounds=bounds, rng=1, learning_rate=0.05, maxiter=500)
    least = scipy.optimize.brute(lambda x: waves(np.array(x))[0], [(-2, 2), (-2, 2)], Ns=80)
    assert len(best.results) == 20
    assert best.fun == pytest.approx(waves(least)[0], abs=1e-6)
    again = multistart(waves, 20, jac=True, bounds=bounds, rng=1, learning_rate=0.05, maxiter=500)
    assert [r.fun for r in again.results] == [r.fun for r in best.results]
    assert len({tuple(r.x.round(3)) for r in best.results}) > 3


def test_starts_of_other_kinds():
    tensors = torch.linspace(-1, 1, 6).reshape(3, 2)
    best = multistart(lambda x: ((x**2).sum(), 2 * x), tensors, jac=True, learning_rate=0.1)
    assert isinstance(best.x, torch.Tensor)
    mapped = []
    nested = [{"a": np.ones(2)}, {"a": np.zeros(2)}]
    best = multistart(
        lambda x: ((x["a"] ** 2).sum(), {"a": 2 * x["a"]}), nested, jac=True, maxiter=2,
        workers=lambda function, starts: [mapped.append(s) or function(s) for s in starts],
    )  # fmt: skip
    assert len(mapped) == 2
    assert best.fun == 0


# Bad input: keywords, error, words
WRONG = {
    "no start": ({"x0s": np.zeros((0, 2))}, ValueError, ["x0s", "no start"]),
    "one start": ({"x0s": np.zeros(2)}, ValueError, ["x0s", "(2,)"]),
    "text": ({"x0s": "many"}, TypeError, ["x0s", "many"]),
    "none": ({"x0s": 0, "bounds": [(0, 1)]}, ValueError, ["x0s", "0"]),
    "no bounds": ({"x0s": 4}, ValueError, ["bounds", "None"]),
    "infinite bounds": ({"x0s": 4, "bounds": [(0, None)]}, ValueError, ["bounds", "inf"]),
    "checkpoint": ({"checkpoint": "a.npz"}, ValueError, ["checkpoint", "a.npz"]),
    "workers": ({"workers": 0}, ValueError, ["workers", "0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_starts(case):
    keywords, error, words = WRONG[case]
    with pytest.raises(error) as caught:
        multistart(**{"fun": bowl, "x0s": np.ones((2, 2)), "jac": True} | keywords)
    for word in words:
        assert word in str(caught.value)


def test_the_objective_of_the_table_is_rosenbrock():
    np.testing.assert_allclose(valley(START, 1.0, DATA)[0], rosen(START))
    np.testing.assert_allclose(valley(START, 1.0, DATA)[1], rosen_der(START))
