"""`minimize` keeps SciPy's contract through both doors, and leaves arrays where they are."""

import pickle
import subprocess
import sys
import warnings

import array_api_strict
import jax
import jax.numpy as jnp
import numba
import numpy as np
import optax
import pytest
import scipy.optimize
import torch
from scipy.optimize import Bounds, OptimizeResult, OptimizeWarning, rosen, rosen_der

import adamw_numba
from adamw_numba import AdamW, minimize, multistart, schedules
from adamw_numba.minimizer import options as options_of_minimize
from adamw_numba.state import State

START = np.array([1.3, 0.7, 0.8, 1.9, 1.2])
SHORT = {"learning_rate": 0.02, "maxiter": 60}


def both(x, factor=1.0):
    return factor * rosen(x), factor * rosen_der(x)


def bowl(x):
    """A quadratic of any real array, with its gradient: least at 1."""
    return ((x - 1) ** 2).sum(), 2 * (x - 1)


def through_scipy(fun, x0, args=(), *, callback=None, jac=None, bounds=None, tol=None, **options):
    keywords = {"method": minimize, "jac": jac, "bounds": bounds, "tol": tol, "callback": callback}
    return scipy.optimize.minimize(fun, x0, args, options=options, **keywords)


DOORS = {"alone": minimize, "SciPy's method": through_scipy}

# How a problem can be said: fun, keywords
PROBLEMS = {
    "jac=True": (both, {"jac": True}),
    "jac": (rosen, {"jac": rosen_der}),
    "2-point by default": (rosen, {}),
    "args": (both, {"jac": True, "args": (2.0,)}),
    "one argument that is no tuple": (both, {"jac": True, "args": 2.0}),
    "args of jac": (lambda x, a: a * rosen(x), {"jac": lambda x, a: a * rosen_der(x), "args": (2.0,)}),
    "Bounds": (both, {"jac": True, "bounds": Bounds(0.75, 1.1)}),
    "pairs": (both, {"jac": True, "bounds": [(None, 1.1), (0.9, None), (0.8, 0.8), (None, None), (0, np.inf)]}),
    "bounds and differences": (rosen, {"bounds": [(0.5, 1.1)] * 4 + [(1.0, 1.0)]}),
    "tol": (both, {"jac": True, "tol": 30.0}),
    "clipped, with AMSGrad and decay": (
        both,
        {"jac": True, "global_clipnorm": 1.0, "amsgrad": True, "weight_decay": 0.01},
    ),
    "a schedule and averages": (
        both,
        {"jac": True, "learning_rate": schedules.CosineDecay(0.1, 60), "use_ema": True},
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_both_doors_give_the_same_numbers(case):
    fun, keywords = PROBLEMS[case]
    alone, method = (door(fun, START, **SHORT | keywords) for door in DOORS.values())
    assert isinstance(method, OptimizeResult)
    assert set(alone) == set(method)
    for key in ("x", "jac", "fun", "nit", "nfev", "njev", "status", "success", "message", "x_last", "fun_last"):
        np.testing.assert_array_equal(alone[key], method[key], err_msg=key)
    assert alone.fun < 2 * rosen(START)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"global_clipnorm": 3.0}, {"weight_decay": 0.1}])
def test_steps_are_those_of_the_optimizer(options):
    """And of optax, where it has the option and with its epsilon matched."""
    x, optimizer = START.copy(), AdamW(0.01, **{"weight_decay": 0.0} | options)
    optimizer.build([x])
    for _ in range(20):
        optimizer.apply([rosen_der(x)])
    result = minimize(both, START, jac=True, learning_rate=0.01, maxiter=20, **options)
    np.testing.assert_array_equal(result.x_last, x)
    assert result.fun_last == rosen(x)


def test_first_steps_are_those_of_optax():
    with jax.enable_x64(True):
        x = jnp.asarray(START)
        optimizer = optax.adam(0.01, eps=0.0, eps_root=1e-300)
        state = optimizer.init(x)
        for _ in range(10):
            updates, state = optimizer.update(jnp.asarray(rosen_der(np.asarray(x))), state, x)
            x = optax.apply_updates(x, updates)
        result = minimize(both, START, jac=True, learning_rate=0.01, maxiter=10, epsilon=1e-300)
        np.testing.assert_allclose(result.x_last, x, rtol=1e-12)


def test_the_projected_minimum_is_that_of_l_bfgs_b():
    bounds = Bounds([0.5, -np.inf, 0.2, 0.7, -1], [0.9, 0.6, 0.2, 2.0, 0.1])
    ours = minimize(both, START, jac=True, bounds=bounds, learning_rate=schedules.CosineDecay(0.05, 3000), maxiter=3000)
    theirs = scipy.optimize.minimize(both, START, jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-12)
    assert ours.success
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-6)
    assert ((ours.x >= bounds.lb) & (ours.x <= bounds.ub)).all()


# Starting points: x0, dtype of the result
STARTS = {
    "integers": (np.array([1, 2, 3]), np.float64),
    "a list": ([1.0, 2.0, 3.0], np.float64),
    "a list of integers": ([3, 2, 1], np.float64),
    "float32": (np.ones(3, np.float32), np.float32),
    "a number": (3.0, np.float64),
    "0-d": (np.array(2.0), np.float64),
    "strided": (np.arange(6.0)[::2], np.float64),
    "big-endian": (np.arange(3, dtype=">f8"), np.float64),
}


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_starting_points(case, door):
    x0, dtype = STARTS[case]
    before = np.array(x0, copy=True)
    if isinstance(x0, np.ndarray):
        x0.flags.writeable = False
    result = door(bowl, x0, jac=True, learning_rate=0.1, maxiter=500)
    np.testing.assert_array_equal(x0, before)
    assert result.x.dtype == dtype
    np.testing.assert_allclose(result.x, 1, atol=1e-5)
    assert result.success


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(
    "x0", [np.ones(2, complex), np.array([1.0, None]), ["a", "b"]], ids=["complex", "object", "str"]
)
def test_refused_starting_points(door, x0):
    with pytest.raises(TypeError, match=r"x0|expected"):
        door(lambda x: pytest.fail("called"), x0)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_callbacks(door):
    xs, results = [], []

    def by_name(intermediate_result):
        results.append(intermediate_result)
        intermediate_result.x[:] = np.nan  # a copy

    first = door(both, START, jac=True, callback=lambda xk: xs.append(xk), **SHORT)
    second = door(both, START, jac=True, callback=by_name, **SHORT)
    assert len(xs) == len(results) == first.nit == 60
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(xs[-1], first.x_last)
    assert [r.nit for r in results] == list(range(1, 61))
    assert [rosen(x) for x in xs] == [r.fun for r in results]


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_stop_iteration(door):
    counts = iter(range(100))

    def stop(intermediate_result):
        if next(counts) % 7 == 6:
            raise StopIteration

    result = door(both, START, jac=True, callback=stop, **SHORT)
    theirs = scipy.optimize.minimize(both, START, jac=True, method="BFGS", callback=stop)
    assert (result.nit, result.status, result.success, result.message) == (7, 99, False, theirs.message)
    assert theirs.status == 99


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_display_and_warnings(door, capsys):
    with pytest.warns(RuntimeWarning, match="Maximum number of iterations"):
        door(both, START, jac=True, disp=True, **SHORT)
    assert "Function evaluations: 61" in capsys.readouterr().out
    with pytest.warns(OptimizeWarning, match="Unknown solver options: nonsense"):
        door(both, START, jac=True, nonsense=1, **SHORT)
    with pytest.warns(OptimizeWarning, match="`lr` is `learning_rate`"):
        door(both, START, jac=True, lr=1, **SHORT)


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("hess", lambda x: np.eye(5), "Hessian"),
        ("hessp", lambda x, p: p, "Hessian"),
        ("constraints", {"type": "eq", "fun": lambda x: x[0]}, "constraints"),
        ("constraints", [scipy.optimize.LinearConstraint(np.eye(5))], "constraints"),
    ],
)
def test_what_is_not_used_warns(keyword, value, words):
    with pytest.warns(RuntimeWarning, match=words):
        minimize(both, START, jac=True, **SHORT | {keyword: value})


def egg_box(x):
    return np.cos(3 * x).sum() + (x**2).sum() / 9


def test_inside_global_optimizers():
    options = {"method": minimize, "options": {"learning_rate": 0.1, "maxiter": 100}}
    hops = scipy.optimize.basinhopping(egg_box, [2.0], niter=4, rng=0, minimizer_kwargs=options)
    annealed = scipy.optimize.dual_annealing(egg_box, [(-5, 5)], maxiter=10, rng=0, minimizer_kwargs=options)
    least = scipy.optimize.brute(egg_box, [(-2, 2)], Ns=400)
    assert hops.fun == pytest.approx(egg_box(least), abs=1e-6)
    assert annealed.fun == pytest.approx(egg_box(least), abs=1e-6)


# Gradients: keywords, tolerance against the analytic one
DIFFERENCES = {
    "2-point": ({"jac": "2-point"}, 1e-5),
    "3-point": ({"jac": "3-point"}, 1e-8),
    "cs": ({"jac": "cs"}, 1e-13),
    "relative step": ({"jac": "3-point", "finite_diff_rel_step": 1e-5}, 1e-8),
    "map": ({"jac": "2-point", "workers": map}, 1e-5),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_finite_differences(case):
    keywords, tolerance = DIFFERENCES[case]
    result = minimize(rosen, START, maxiter=0, **keywords)
    np.testing.assert_allclose(result.jac, rosen_der(START), rtol=tolerance)
    per_evaluation = 11 if keywords["jac"] == "3-point" else 6
    assert (result.nfev, result.njev) == (per_evaluation, 1)


PROCESSES = """
import numba
import numpy as np
from scipy.optimize import rosen
from adamw_numba import minimize, multistart
starts = np.linspace(0.5, 2, 10).reshape(2, 5)
options = {"maxiter": 3, "jac": "3-point"}
alone = [minimize(rosen, x0, **options) for x0 in starts]
by_two = [minimize(rosen, x0, workers=2, **options) for x0 in starts]
for one, other in zip(alone, by_two):
    assert (one.x == other.x).all() and one.nfev == other.nfev, (one, other)
many = multistart(rosen, starts, workers=2, **options)
assert sorted(r.fun for r in alone) == [r.fun for r in many.results]
class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a)
def broken(x):
    raise Unpicklable(1, 2)
try:
    multistart(broken, starts, workers=2)
except Exception as error:
    print(type(error).__name__)
"""


def test_workers_are_processes():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROCESSES], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Broken" in done.stdout  # what cannot be sent back ends the pool, and does not hang


def nested(x):
    value = ((x["a"] - 1) ** 2).sum() + ((x["b"][0] + 2) ** 2).sum()
    return value, {"b": [2 * (x["b"][0] + 2)], "a": 2 * (x["a"] - 1)}


def strict(array):
    return array_api_strict.asarray(array)


def strict_bowl(x):
    return array_api_strict.sum((x - 1) ** 2), 2 * (x - 1)


# Arrays of other libraries: fun, x0, keywords, type of the result
ELSEWHERE = {
    "torch": (bowl, torch.zeros(3), {"jac": True}, torch.Tensor),
    "torch, 2-d": (bowl, torch.zeros(2, 3, dtype=torch.float64), {"jac": True}, torch.Tensor),
    "torch, differentiated": (lambda x: ((x - 1) ** 2).sum(), torch.zeros(3), {"jac": "torch"}, torch.Tensor),
    "a parameter": (lambda x: ((x - 1) ** 2).sum(), torch.nn.Parameter(torch.zeros(3)), {"jac": "torch"}, torch.Tensor),
    "torch, bounded": (bowl, torch.zeros(3), {"jac": True, "bounds": Bounds(-1, 2)}, torch.Tensor),
    "torch, bfloat16": (bowl, torch.zeros(3, dtype=torch.bfloat16), {"jac": True, "gtol": 1e-2}, torch.Tensor),
    "strict": (strict_bowl, strict(np.zeros(3)), {"jac": True}, type(strict(np.zeros(3)))),
    "strict, bounded": (
        strict_bowl,
        strict(np.zeros((2, 2))),
        {"jac": True, "bounds": Bounds(0, 2)},
        type(strict(np.zeros(3))),
    ),
    "jax": (bowl, jnp.zeros(3), {"jac": True}, jax.Array),
    "jax, differentiated": (lambda x: ((x - 1) ** 2).sum(), jnp.zeros(3), {"jac": "jax"}, jax.Array),
    "jax, bounded, averaged": (bowl, jnp.zeros(3), {"jac": True, "bounds": Bounds(0, 2), "use_ema": True}, jax.Array),
}


def refuse(*args, **kwargs):
    raise AssertionError("an array was converted to NumPy")


@pytest.mark.parametrize("case", ELSEWHERE)
def test_arrays_stay_where_they_are(case, monkeypatch):
    fun, x0, keywords, kind = ELSEWHERE[case]
    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    monkeypatch.setattr(type(strict(np.zeros(1))), "__array__", refuse, raising=False)
    seen = []
    keywords = {"learning_rate": 0.2, "gtol": 1e-3, "maxiter": 400} | keywords
    result = minimize(fun, x0, callback=seen.append, **keywords)
    monkeypatch.undo()
    for x in (result.x, result.x_last, result.jac, seen[0]):
        assert isinstance(x, kind)
        assert tuple(x.shape) == tuple(x0.shape)
    assert result.x.dtype == x0.dtype
    assert result.success, result.message
    np.testing.assert_allclose(np.asarray(result.x.float() if kind is torch.Tensor else result.x), 1, atol=1e-2)
    assert (np.asarray(x0.detach().float() if kind is torch.Tensor else x0) == 0).all()


@pytest.mark.parametrize("make", [np.zeros, torch.zeros, jnp.zeros], ids=["numpy", "torch", "jax"])
def test_nested_containers(make):
    x0 = {"a": make(2), "b": [make((2, 3))]}
    result = minimize(nested, x0, jac=True, learning_rate=0.2, gtol=1e-3, bounds={"b": (-1.5, None)})
    assert list(result.x) == ["a", "b"]
    assert type(result.x["a"]) is type(x0["a"])
    np.testing.assert_allclose(result.x["a"], 1, atol=1e-3)
    np.testing.assert_allclose(result.x["b"][0], -1.5)
    assert set(result.state) >= {"momentum/a", "velocity/b/0"}


def test_numpy_arrays_differentiated_by_a_library():
    for jac in ("torch", "jax"):
        result = minimize(lambda x: ((x - 1) ** 2).sum(), np.zeros((2, 2)), jac=jac, learning_rate=0.1)
        assert result.x.dtype == np.float64
        np.testing.assert_allclose(result.x, 1, atol=1e-5)


# Stopping: keywords, status, words of the message
STOPS = {
    "gtol": ({"learning_rate": 0.1}, 0, "gtol"),
    "ftol": ({"learning_rate": 0.1, "gtol": None, "ftol": 1e-6}, 0, "ftol"),
    "xtol": ({"learning_rate": 0.1, "gtol": None, "xtol": 1e-5}, 0, "xtol"),
    "patience": ({"learning_rate": 0.1, "gtol": None, "patience": 30}, 0, "patience"),
    "maxiter": ({"maxiter": 5}, 1, "iterations"),
    "no iterations": ({"maxiter": 0}, 1, "iterations"),
    "maxfev": ({"maxfev": 5}, 2, "evaluations"),
    "maxtime": ({"maxtime": 1e-9}, 2, "time"),
}


@pytest.mark.parametrize("case", STOPS)
def test_stops(case):
    keywords, status, words = STOPS[case]
    result = minimize(bowl, np.zeros(3), jac=True, **keywords)
    assert (result.status, result.success) == (status, status == 0)
    assert words in result.message
    assert result.nfev <= keywords.get("maxfev", np.inf)
    if status == 0:
        np.testing.assert_allclose(result.x, 1, atol=2e-2)


# What is no success: keywords, iterations, where it ends. The function is flat or NaN, and may never have moved.
NO_SUCCESS = {
    "accumulation": ({"gradient_accumulation_steps": 12, "ftol": 1e-12, "xtol": 1e-12, "patience": 2}, 11),
    "a rate of zero": ({"learning_rate": lambda step: 0.0, "ftol": 1e-12, "xtol": 1e-12, "patience": 2}, 30),
    "skipped": ({"fun": lambda x: (1.0, x * np.nan), "nonfinite": "skip", "ftol": 0.1, "patience": 2}, 30),
    "NaN": ({"fun": lambda x: (np.nan, x), "nonfinite": "propagate", "xtol": 1.0, "patience": 2}, 30),
}


@pytest.mark.parametrize("case", NO_SUCCESS)
def test_no_success_without_updates(case):
    keywords, maxiter = NO_SUCCESS[case]
    result = minimize(**{"fun": bowl, "x0": np.zeros(3), "jac": True, "gtol": None, "maxiter": maxiter} | keywords)
    assert (result.status, result.nit) == (1, maxiter)


@pytest.mark.parametrize("bad", [(-np.inf, 1.0), (-5.0, np.nan)], ids=["-inf", "NaN gradient"])
def test_only_finite_points_are_the_best(bad):
    value, slope = bad

    def fun(x):
        return (value, slope * np.ones_like(x)) if x[0] < 0.5 else (float(x[0]), np.ones_like(x))

    result = minimize(fun, [1.0], jac=True, learning_rate=0.1)
    assert (result.status, result.fun) == (3, result.x[0])
    assert 0.5 <= result.fun < 0.6


def test_starts_at_infinity_come_last():
    starts = multistart(lambda x: (-np.inf if x[0] < 0 else float(x[0]), x), [[-1.0], [1.0]], jac=True, maxiter=2)
    assert [np.isfinite(result.fun) for result in starts.results] == [True, False]
    starts.x[:] = 7
    assert starts.results[0].x[0] < 1


def test_complex_steps_need_a_complex_function():
    with pytest.raises(TypeError, match="complex"):
        minimize(lambda x: float((np.real(x) ** 2).sum()), np.ones(2), jac="cs")


@pytest.mark.parametrize(
    ("x0", "bounds"),
    [
        ([np.zeros(2)], [[(0.5, 2), (None, 0.5)]]),
        ({0: np.zeros(2)}, {0: (0.5, 2)}),
        ({"a": np.zeros(2)}, {"a": (2, 3)}),
    ],
    ids=["a list", "an integer", "text"],
)
def test_bounds_are_like_x0(x0, bounds):
    def fun(x):
        leaf = next(iter(x.values())) if isinstance(x, dict) else x[0]
        return 0.0, type(x)([np.ones(2)]) if isinstance(x, list) else dict.fromkeys(x, np.ones_like(leaf))

    result = minimize(fun, x0, jac=True, bounds=bounds, maxiter=1, history=False)
    leaf = next(iter(result.x.values())) if isinstance(x0, dict) else result.x[0]
    assert leaf[0] == (2 if isinstance(x0, dict) and "a" in x0 else 0.5)


# Nested bounds: x0, bounds, the least value of each array
ONE = np.zeros(2)
NESTED = {
    "keys with slashes": ({"mlp/~/linear_0": {"w": ONE}, "mlp": {"w": ONE}}, {"mlp/~/linear_0": {"w": (1, 2)}}, [1, 0]),
    "a slash, for all below": ({"a/b": {"c": ONE, "d": ONE}, "a": ONE}, {"a/b": (2, None)}, [2, 2, 0]),
    "a slash, not a path": ({"a/b": ONE, "a": {"c": ONE}}, {"a": {"c": (3, 4)}}, [0, 3]),
    "pairs": ([("enc/kernel", ONE), ("enc/bias", ONE)], {"enc/bias": (1, 5)}, [0, 1]),
    "pairs of bounds": (
        [("enc/kernel", ONE), ("enc/bias", ONE)],
        [("enc/bias", (1, 5)), ("enc/kernel", (2, 5))],
        [2, 1],
    ),
    "one pair": ([("enc/kernel", ONE)], [("enc/kernel", (2, 5))], [2]),
    "Bounds in a list": ([ONE, ONE], [Bounds(1, 2), Bounds(3, 4)], [1, 3]),
    "dicts in a list": ([{"a": ONE}, {"b": ONE}], [{"a": (1, 2)}, {"b": (3, 4)}], [1, 3]),
    "nothing in a list": ([ONE, ONE], [None, Bounds(3, 4)], [0, 3]),
    "one for all": ({"a/b": ONE, "c": [ONE, ONE]}, Bounds(1, 2), [1, 1, 1]),
}


def arrays_of(x):
    """The arrays of a container, in order."""
    if isinstance(x, (np.ndarray, str)):
        return [x] * isinstance(x, np.ndarray)
    return [leaf for child in (x.values() if isinstance(x, dict) else x) for leaf in arrays_of(child)]


@pytest.mark.parametrize("case", NESTED)
def test_nested_bounds(case):
    x0, bounds, least = NESTED[case]
    result = minimize(lambda x: (0.0, x), x0, jac=True, bounds=bounds, maxiter=0)
    np.testing.assert_array_equal(arrays_of(result.x), [[value] * 2 for value in least])


@pytest.mark.parametrize(
    ("x0", "bounds", "words"),
    [
        ({"a/b": ONE}, {"a": {"b": (0, 1)}}, ["'a'", "['a/b']"]),
        ([("a", ONE)], [("b", (0, 1))], ["['b']", "['a']"]),
        ({"a": {"b": ONE}}, {"a": 3}, ["3", "['b']", "expected"]),
    ],
)
def test_bounds_of_what_x0_does_not_hold(x0, bounds, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        minimize(lambda x: pytest.fail("called"), x0, jac=True, bounds=bounds)
    for word in ("`bounds`", *words):
        assert word in str(caught.value)


def test_the_state_is_listed_as_often_for_many_arrays_as_for_few(monkeypatch):
    """Every array that a run adds to the state was compared with the names of all others."""
    calls, places = [], State.places
    monkeypatch.setattr(State, "places", lambda self: (calls.append(1), places(self))[1])
    counts = []
    for number in (3, 30):
        calls.clear()
        x0 = [np.ones(2) for _ in range(number)]
        minimize(lambda x: (sum(leaf.sum() for leaf in x), x), x0, jac=True, maxiter=2)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_limits_beyond_floats():
    assert minimize(bowl, np.ones(2), jac=True, maxiter=10**400, maxfev=10**400).success
    with pytest.raises(ValueError, match="results"):
        adamw_numba.plot.waterfall({"results": []})


def test_no_start_is_left_out():
    def fun(x):
        if x[0] == 1:
            raise StopIteration
        return bowl(x)

    with pytest.raises(RuntimeError, match="StopIteration"):
        multistart(fun, np.arange(3.0)[:, None], jac=True, maxiter=1)
    with pytest.raises(ValueError, match="gave 1 results; expected 3"):
        multistart(bowl, np.arange(3.0)[:, None], jac=True, maxiter=1, workers=lambda f, xs: [f(xs[0])])


@pytest.mark.parametrize("maxfev", [6, 7, 25])
def test_differences_keep_within_maxfev(maxfev):
    assert minimize(rosen, START, maxfev=maxfev).nfev <= maxfev


def falls_off(x):
    """NaN below 0.5."""
    return (float(x[0]) if x[0] > 0.5 else np.nan), np.ones_like(x)


def test_nonfinite():
    result = minimize(falls_off, [1.0], jac=True, learning_rate=0.1)
    assert result.status == 3
    assert 0.5 < result.x[0] < 0.6
    assert result.fun == result.x[0]
    assert np.isnan(result.fun_last)
    onward = minimize(falls_off, [1.0], jac=True, learning_rate=0.1, nonfinite="propagate", maxiter=20)
    assert (onward.status, onward.nit) == (1, 20)
    with pytest.raises(FloatingPointError, match="not finite"):
        minimize(lambda x: (0.0, x * np.nan), [1.0], jac=True, nonfinite="raise")
    skipped = minimize(lambda x: (0.0, x * np.nan), [1.0], jac=True, nonfinite="skip", maxiter=3)
    assert (skipped.status, skipped.nit, skipped.x_last[0]) == (1, 3, 1.0)


def test_the_best_point_is_returned():
    result = minimize(both, START, jac=True, learning_rate=0.3, maxiter=50)
    assert result.fun == result.history["fun"].min() < result.fun_last
    assert (rosen(result.x), rosen(result.x_last)) == (result.fun, result.fun_last)
    np.testing.assert_array_equal(result.jac, rosen_der(result.x))
    last = minimize(both, START, jac=True, learning_rate=0.3, maxiter=50, return_best=False)
    assert last.fun == last.fun_last == result.fun_last


def test_history_is_bounded_and_even():
    whole = minimize(both, START, jac=True, maxiter=300, history=1000).history
    thin = minimize(both, START, jac=True, maxiter=300, history=50).history
    assert list(whole["nit"]) == list(range(301))
    assert len(thin["nit"]) <= 51
    assert thin["nit"][-1] == 300
    assert len(set(np.diff(thin["nit"][:-1]))) == 1
    np.testing.assert_array_equal(thin["fun"], whole["fun"][thin["nit"]])
    assert (np.diff(whole["time"]) > 0).all()
    assert not len(minimize(both, START, jac=True, maxiter=3, history=False).history["nit"])


def test_history_says_what_happened():
    path = []
    rate = schedules.CosineDecay(0.05, 20)
    result = minimize(both, START, jac=True, maxiter=20, learning_rate=rate, callback=lambda xk: path.append(xk))
    xs = [START, *path]
    np.testing.assert_array_equal(result.history["fun"], [rosen(x) for x in xs])
    np.testing.assert_array_equal(result.history["gradient_norm"], [np.abs(rosen_der(x)).max() for x in xs])
    np.testing.assert_array_equal(result.history["step_norm"][1:], np.abs(np.diff(xs, axis=0)).max(axis=1))
    np.testing.assert_array_equal(result.history["learning_rate"][1:], [rate(t) for t in range(20)])


@pytest.mark.parametrize(
    "options", [{"learning_rate": 0.001}, {"learning_rate": 0.001, "amsgrad": True, "use_ema": True}]
)
def test_warm_start(options):
    whole = minimize(both, START, jac=True, maxiter=40, **options)
    half = minimize(both, START, jac=True, maxiter=15, **options)
    rest = minimize(both, half, jac=True, maxiter=25, **options)
    apart = minimize(both, half.x_last, jac=True, maxiter=25, state=half.state, **options)
    for result in (rest, apart):
        np.testing.assert_array_equal(result.x_last, whole.x_last)
        assert result.state["iteration"] == 40
    with pytest.raises(ValueError, match="velocity_hat"):
        minimize(both, half, jac=True, **options | {"amsgrad": "amsgrad" not in options})


class Shuffled:
    """A new order at every walk, from one seed: like a loader of data."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        generator = np.random.default_rng(0)
        return iter(generator.permutation(self.data))


def test_batches():
    data = np.linspace(-1, 3, 8)
    seen = []

    def loss(x, batch, factor):
        seen.append(float(batch))
        return factor * float(((x - batch) ** 2).sum()), factor * 2 * (x - batch)

    options = {"jac": True, "args": (0.5,), "learning_rate": schedules.CosineDecay(0.2, 400), "maxiter": 400}
    walked = minimize(loss, np.zeros(1), batches=Shuffled(data), **options)
    order = list(Shuffled(data))
    assert seen == [order[k % 8] for k in range(401)]
    called = minimize(loss, np.zeros(1), batches=lambda number: order[number % 8], **options)
    np.testing.assert_array_equal(walked.x, called.x)
    assert walked.x == pytest.approx(data.mean(), abs=0.05)
    np.testing.assert_array_equal(walked.x, walked.x_last)


# Bad input: keywords that replace good ones, error, words
WRONG = {
    "fun": ({"fun": 3}, TypeError, ["`fun`", "3"]),
    "x0 empty": ({"x0": np.zeros(0)}, ValueError, ["x0", "(0,)"]),
    "x0 nothing": ({"x0": {}}, ValueError, ["x0", "empty"]),
    "x0 None": ({"x0": None}, TypeError, ["x0"]),
    "x0 NaN": ({"x0": [np.nan]}, ValueError, ["x0", "NaN"]),
    "x0 masked": ({"x0": np.ma.ones(3)}, TypeError, ["MaskedArray"]),
    "x0 complex tensor": ({"x0": torch.ones(3, dtype=torch.complex64)}, TypeError, ["complex64"]),
    "jac": ({"jac": "4-point"}, ValueError, ["`jac`", "4-point", "3-point"]),
    "differences of tensors": ({"x0": torch.ones(3), "jac": None}, ValueError, ["jac", "torch"]),
    "torch for jax": ({"x0": jnp.ones(3), "jac": "torch"}, TypeError, ["jax", "torch"]),
    "bounds number": ({"bounds": 3}, TypeError, ["bounds", "3"]),
    "bounds count": ({"bounds": [(0, 1)]}, ValueError, ["bounds", "3 pairs"]),
    "bounds shape": ({"bounds": Bounds([0, 0], [1, 1])}, ValueError, ["bounds", "(3,)"]),
    "bounds crossed": ({"bounds": [(0, 1), (1, 0), (0, 1)]}, ValueError, ["bounds", "(1,)", "lower <= upper"]),
    "bounds NaN": ({"bounds": Bounds(np.nan, 1)}, ValueError, ["bounds", "nan"]),
    "callback": ({"callback": 3}, TypeError, ["callback", "3"]),
    "maxiter": ({"maxiter": 2.5}, ValueError, ["maxiter", "2.5"]),
    "maxfev": ({"maxfev": 0}, ValueError, ["maxfev", "0"]),
    "gtol": ({"gtol": -1}, ValueError, ["gtol", "-1"]),
    "tol": ({"tol": "small"}, ValueError, ["tol", "small"]),
    "patience": ({"patience": True}, ValueError, ["patience", "True"]),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, ["nonfinite", "ignore", "stop"]),
    "learning rate": ({"learning_rate": -1}, ValueError, ["learning_rate", "-1"]),
    "two clips": ({"clipnorm": 1, "clipvalue": 1}, ValueError, ["clipnorm"]),
    "history": ({"history": -1}, ValueError, ["history", "-1"]),
    "state": ({"state": 3}, TypeError, ["state", "3"]),
    "state of another": ({"state": {"iteration": 1}}, ValueError, ["state", "momentum/0"]),
    "batches walked once": ({"batches": iter([1])}, TypeError, ["batches", "once"]),
    "batches": ({"batches": 3}, TypeError, ["batches", "3"]),
    "checkpoint": ({"checkpoint": 3}, TypeError, ["checkpoint", "3"]),
    "bounds text": ({"bounds": [("a", "b")] * 3}, TypeError, ["bounds", "'a'"]),
    "bounds of nothing": ({"x0": {"a": np.ones(2)}, "bounds": {"b": (0, 1)}}, ValueError, ["bounds", "'b'", "'a'"]),
    "bounds inside": ({"x0": {"a": {"b": np.ones(2)}}, "bounds": {"a": {"c": (0, 1)}}}, ValueError, ["'c'", "'b'"]),
    "bounds of too many": ({"x0": [np.ones(2)], "bounds": [(0, 1)] * 3}, ValueError, ["bounds", "[1, 2]"]),
    "bounds beyond float32": (
        {"x0": np.ones(3, np.float32), "bounds": [(1e300, 2e300)] * 3},
        ValueError,
        ["bounds", "float32"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_before_the_objective_is_called(case):
    keywords, error, words = WRONG[case]
    good = {"fun": lambda *args: pytest.fail("called"), "x0": np.ones(3), "jac": True}
    with pytest.raises(error) as caught:
        minimize(**good | keywords)
    for word in words:
        assert word in str(caught.value)


# What an objective returns: fun, keywords, error, words
RETURNS = {
    "gradient shape": (lambda x: (0.0, np.ones(4)), TypeError | ValueError, ["(4,)", "(3,)"]),
    "gradient of complex numbers": (lambda x: (0.0, np.ones(3) * 1j), TypeError, ["complex128"]),
    "no gradient": (lambda x: 0.0, TypeError, ["(value, gradient)", "0.0"]),
    "gradient None": (lambda x: (0.0, None), TypeError, ["the gradient is None"]),
    "gradient with a mask": (lambda x: (0.0, np.ma.array(x, mask=True)), TypeError, ["the gradient is", "mask"]),
    "value None": (lambda x: (None, x), TypeError, ["None", "real number"]),
    "value array": (lambda x: (x, x), TypeError, ["real number"]),
    "value beyond float64": (lambda x: (10**400, x), ValueError, ["float64"]),
    "value complex": (lambda x: (1j, x), TypeError, ["1j", "real number"]),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_an_objective_may_return(case):
    fun, error, words = RETURNS[case]
    with pytest.raises(error.__args__ if hasattr(error, "__args__") else error) as caught:
        minimize(fun, np.ones(3), jac=True)
    for word in words:
        assert word in str(caught.value)


def test_an_objective_that_raises_leaves_the_best_in_a_note():
    calls = []

    def fun(x):
        calls.append(x.copy())
        if len(calls) == 9:
            raise ZeroDivisionError("ninth call")
        return both(x)

    with pytest.raises(ZeroDivisionError, match="ninth call") as caught:
        minimize(fun, START, jac=True)
    (result, notes) = caught.value.intermediate_result, "\n".join(caught.value.__notes__)
    assert rosen(result.x) == result.fun == min(map(rosen, calls[:8]))
    assert "iteration 8" in notes
    assert repr(result.fun) in notes


def test_keyboard_interrupt_stays_one():
    def interrupt(xk):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimize(both, START, jac=True, callback=interrupt)


def test_an_objective_may_write_into_what_it_is_given():
    def fun(x):
        value, gradient = both(x)
        x[:] = np.nan
        return value, gradient

    np.testing.assert_array_equal(minimize(fun, START, jac=True, **SHORT).x, minimize(both, START, jac=True, **SHORT).x)


def test_progress(capsys):
    seen = []
    minimize(both, START, jac=True, progress=lambda status: seen.append((status.nit, status.fun)), **SHORT)
    assert [nit for nit, _ in seen] == list(range(1, 61))
    minimize(both, START, jac=True, progress=True, **SHORT)
    assert capsys.readouterr().err == ""  # no terminal, no bar


def test_results_travel_and_show_themselves():
    result = minimize(both, START, jac=True, **SHORT)
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result)
    np.testing.assert_array_equal(again.x, result.x)
    assert "<table>" in result._repr_html_()
    assert "momentum" not in repr(result)
    assert "maximum number of iterations" in repr(result).lower()


WITHOUT = """
import sys, numpy as np
for name in ("scipy", "tqdm", "matplotlib"):
    sys.modules[name] = None
import adamw_numba
result = adamw_numba.minimize(lambda x: ((x**2).sum(), 2 * x), np.ones(2), jac=True, learning_rate=0.1, progress=True)
print(result.success, result.x.shape, result["nit"] == result.nit, "nfev" in dir(result))
print(result)
for call in (
    lambda: adamw_numba.minimize(lambda x: 0.0, np.ones(2)),
    lambda: adamw_numba.multistart(lambda x: 0.0, 3, bounds=[(0, 1)]),
    lambda: adamw_numba.plot.convergence(result),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_scipy_matplotlib_and_tqdm():
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True (2,) True True"
    assert [line for line in lines if "adamw-numba[" in line] == lines[-3:]
    assert ["scipy" in lines[-3], "scipy" in lines[-2], "plot" in lines[-1]] == [True] * 3


def test_the_function_is_public():
    assert {"minimize", "multistart", "plot"} <= set(adamw_numba.__all__)


def test_what_cannot_be_sent_to_processes():
    """Said at once: a pool whose work cannot be sent may wait for ever."""
    with pytest.raises(TypeError, match="workers=1"):
        multistart(lambda x: ((x**2).sum(), 2 * x), [np.ones(2), np.zeros(2)], jac=True, workers=2, maxiter=2)


def test_an_error_before_anything_is_evaluated():
    def fun(x):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError) as caught:
        minimize(fun, np.ones(2), jac=True)
    assert any("nothing evaluated yet" in note for note in caught.value.__notes__)


def test_nothing_was_evaluated():
    """Where the first call fails, there is no value, and no number is given for one."""

    def fails(x):
        raise ZeroDivisionError

    for fun in (fails, numba.njit(lambda x: (1 // int(x[0] - x[0]) * 1.0, x))):
        with pytest.raises(ZeroDivisionError) as caught:
            minimize(fun, START, jac=True)
        assert np.isnan(caught.value.intermediate_result.fun)
        assert caught.value.intermediate_result.nfev == 0
        assert "nothing evaluated yet" in caught.value.__notes__[0]


def test_a_value_and_a_gradient_without_jac():
    with pytest.raises(TypeError, match=r"type tuple; expected a real number: pass jac=True"):
        minimize(both, START)


@pytest.mark.parametrize(("jac", "least"), [("2-point", 6), ("3-point", 11), ("cs", 6)])
def test_maxfev_has_room_for_a_gradient(jac, least):
    calls = []
    with pytest.raises(ValueError, match=rf"`maxfev` is {least - 1}, .* {least} evaluations"):
        minimize(lambda x: calls.append(x) or rosen(x), np.full(5, 0.5), jac=jac, maxfev=least - 1)
    assert not calls
    assert minimize(rosen, np.full(5, 0.5), jac=jac, maxfev=least).nfev == least
    fixed = [(0.5, 0.5)] * 4 + [(None, None)]
    assert minimize(rosen, np.full(5, 0.5), jac="2-point", maxfev=2, bounds=fixed).nfev == 2


def test_counts_as_scipy_takes_them():
    keywords = {"jac": True, "gtol": None, "learning_rate": 0.01}
    assert minimize(bowl, np.ones(2), maxiter=1e1, **keywords).nit == 10
    for unlimited in (None, np.inf):
        assert minimize(bowl, np.ones(2), maxiter=unlimited, maxfev=20.0, **keywords).nfev == 20
    with pytest.raises(ValueError, match="maxiter"):
        minimize(bowl, np.ones(2), maxiter=1.5, **keywords)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_callback_stops_by_returning_true(compiled):
    for returned, nit in ((True, 3), (1, 9), (None, 9)):
        count = iter(range(1, 100))
        stop = lambda x, count=count, returned=returned: returned if next(count) == 3 else None  # noqa: E731
        result = minimize(bowl, np.ones(2), jac=True, callback=stop, maxiter=9, gtol=None, compiled=compiled)
        assert result.nit == nit
        assert (result.status == 99) == (nit == 3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bounds_hold_in_the_dtype_of_x(dtype):
    """0.3 rounds to a larger number in float32 and float16, where the function is not defined any more."""
    seen = []

    def fun(x):
        seen.append(x.copy())
        return float(-x.sum()), -np.ones_like(x)

    result = minimize(fun, np.full(2, 0.2, dtype), jac=True, bounds=[(0.1, 0.3)] * 2, learning_rate=0.05, maxiter=20)
    assert max(float(x.max()) for x in seen) <= 0.3
    assert float(result.x.max()) == float(np.nextafter(np.array(0.3, dtype), np.array(0, dtype)))
    down = minimize(lambda x: (float(x.sum()), np.ones_like(x)), np.full(2, 0.2, dtype), jac=True, bounds=[(0.1, 0.3)] * 2, learning_rate=0.05, maxiter=20)  # fmt: skip
    assert float(down.x.min()) >= 0.1
    fixed = minimize(fun, np.full(2, 0.2, dtype), jac=True, bounds=[(0.1, 0.1)] * 2, maxiter=3)
    assert (fixed.x == np.array(0.1, dtype)).all()


@pytest.mark.parametrize("by_scipy", [True, False])
def test_warnings_point_at_the_caller(by_scipy, monkeypatch):
    monkeypatch.setattr(options_of_minimize, "_warned", set())
    options = {"nonsense": 1, "maxiter": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if by_scipy:
            scipy.optimize.minimize(both, START, jac=True, hess=both, method=minimize, options=options)
        else:
            minimize(both, START, jac=True, hess=both, **options)
        minimize(both, START, jac=True, hess=both, maxiter=1)  # once a process
    assert len(caught) == 2
    assert {warning.filename for warning in caught} == {__file__}


class Array(np.ndarray):
    """Like the tensors of PennyLane."""


class Series:
    """Like those of pandas: no array, but one can be made of it."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def items(self):
        return enumerate(self.values)


SUBCLASSES = {
    "a subclass": lambda: START.view(Array),
    "a matrix": lambda: np.matrix(START),
    "a series": lambda: Series(START.tolist()),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("case", SUBCLASSES)
def test_subclasses_as_x0(case):
    def fun(x):
        assert type(x) is np.ndarray
        return both(x.ravel())[0], both(x.ravel())[1].reshape(x.shape)

    x0 = SUBCLASSES[case]()
    result = minimize(fun, x0, jac=True, **SHORT)
    assert type(result.x) is np.ndarray
    assert result.x.shape == np.asarray(x0).shape
    np.testing.assert_array_equal(result.x.ravel(), minimize(both, START, jac=True, **SHORT).x)


def test_other_names_of_scipy():
    def fun(x):
        return both(x)

    result = minimize(fun, START, jac=True, maxfun=10, return_all=True, learning_rate=0.01)
    assert (result.nfev, result.status) == (10, 2)
    assert len(result.allvecs) == result.nit + 1
    np.testing.assert_array_equal(result.allvecs[0], START)
    np.testing.assert_array_equal(result.allvecs[-1], result.x_last)
    with pytest.raises(ValueError, match="`maxfev` is 3 and `maxfun` is 4"):
        minimize(fun, START, jac=True, maxfev=3, maxfun=4)


@pytest.mark.parametrize(
    "make", [lambda: np.ones(999), lambda: {f"layer_{k}/weights": np.ones((500, 1)) for k in range(30)}]
)
def test_the_note_of_an_error_is_short(make):
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return 1.0, x

    with pytest.raises(ZeroDivisionError) as raised:
        minimize(fun, make(), jac=True)
    assert "best value so far 1.0" in raised.value.__notes__[0]
    assert max(map(len, raised.value.__notes__)) < 500


@pytest.mark.parametrize("bounds", [[(0, 1)], [("a", "b")] * 5, [(1, 0)] * 5, 3])
def test_a_single_array_is_called_x0(bounds):
    with pytest.raises((TypeError, ValueError), match="`bounds` of 'x0'"):
        minimize(both, START, jac=True, bounds=bounds)


@pytest.mark.parametrize(
    ("returned", "stops"), [(True, True), (np.True_, True), (np.False_, False), (1, False), (None, False)]
)
def test_what_a_callback_may_return_to_stop(returned, stops):
    result = minimize(
        lambda x: ((x**2).sum(), 2 * x), [1.0], jac=True, maxiter=5, gtol=None, callback=lambda xk: returned
    )
    assert result.nit == (1 if stops else 5)
    assert (result.status == 99) == stops


def test_one_batch_whose_gradient_vanishes_is_no_minimum():
    batches = [np.zeros(1), np.ones(1)]  # of the first, the gradient is 0 at the start

    def fun(x, batch):
        return ((x - batch) ** 2).sum(), 2 * (x - batch)

    assert minimize(fun, [0.0], jac=True, batches=batches, maxiter=20).nit == 20
    assert minimize(fun, [0.0], jac=True, batches=batches, maxiter=20, gtol=1e-5).nit == 0


def test_a_result_of_another_optimizer_is_no_start():
    found = scipy.optimize.minimize(scipy.optimize.rosen, [1.2, 1.0], method="BFGS")
    with pytest.raises(TypeError, match=r"pass `result\.x`"):
        minimize(scipy.optimize.rosen, found)


def test_a_checkpoint_in_a_folder_that_does_not_exist_is_refused_at_once(tmp_path):
    def fun(x):
        pytest.fail("called")

    with pytest.raises(FileNotFoundError, match=r"`checkpoint` is .*nowhere"):
        minimize(fun, [1.0], jac=True, checkpoint=tmp_path / "nowhere" / "run.npz")
