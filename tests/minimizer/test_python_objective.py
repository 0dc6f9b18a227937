"""Objectives in Python: the compiled loop goes around them, and everything is as in the ordinary loop."""

import gc
import signal
import sys
import threading
import time
import weakref

import numba
import numpy as np
import pytest
from helpers.libraries import jnp, torch
from helpers.results import assert_equal

from adamw_numba import minimize, schedules
from adamw_numba.minimizer import compiled_loop as loops
from adamw_numba.minimizer.python_objective import PythonObjective

START = np.linspace(-1, 1.5, 7)
DATA = np.linspace(0.5, 2, 7)


@pytest.fixture
def advanced(monkeypatch):
    """How often the compiled loop is entered."""
    calls, advance = [], loops.Loop.advance
    monkeypatch.setattr(loops.Loop, "advance", lambda self, most: (calls.append(most), advance(self, most))[1])
    return calls


def both(x, a=1.0):
    return (a * DATA[: x.size].reshape(x.shape) * (x - 2) ** 4).sum(), 4 * a * DATA[: x.size].reshape(x.shape) * (
        x - 2
    ) ** 3


def fill(x, gradient, a):
    value, gradient[...] = both(x, a)
    return value


# What gives value and gradient: keywords
FORMS = {
    "together": {"fun": both, "jac": True},
    "apart": {"fun": lambda x: both(x)[0], "jac": lambda x: both(x)[1]},
    "filled": {"fun": fill, "jac": True, "args": (0.5,)},
    "differences": {"fun": lambda x: both(x)[0]},
    "three points": {"fun": lambda x: both(x)[0], "jac": "3-point", "maxfev": 200},
    "complex steps": {"fun": lambda x: both(x)[0], "jac": "cs"},
    "torch": {"fun": lambda x: (torch.tensor(DATA, dtype=x.dtype) * (x - 2) ** 4).sum(), "jac": "torch"},
    "jax": {"fun": lambda x: (jnp.asarray(DATA, x.dtype) * (x - 2) ** 4).sum(), "jac": "jax"},
    "a matrix": {"fun": both, "jac": True, "x0": np.linspace(0, 1, 6).reshape(2, 3)},
    "a number": {"fun": both, "jac": True, "x0": 0.5},
    "batches": {"fun": lambda x, a: both(x, a), "jac": True, "batches": [0.5, 1.0, 2.0]},
    "float32": {"fun": both, "jac": True, "x0": START.astype(np.float32)},
    "no arguments for Numba": {"fun": numba.njit(lambda x, a: (x.sum() * a[0], np.ones(x.size) * a[0])), "jac": True, "args": ((2.0,),)},
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "bounds": {"bounds": (-0.5, 1.0)},
    "clip and averages": {"global_clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 5},
    "schedule": {"learning_rate": schedules.CosineDecay(0.2, 50), "amsgrad": True, "weight_decay": 0.1},
    "tolerances": {"ftol": 1e-3, "xtol": 1e-3, "gtol": 1e-2, "patience": 20, "maxiter": 2000},
    "history": {"history": 16, "return_best": False},
    "callback": {"callback": lambda x: None, "callback_every": 16},
}


def keywords_of(form, options):
    keywords = {"x0": START, "learning_rate": 0.05, "maxiter": 60, "gtol": None} | FORMS[form] | OPTIONS[options]
    if "bounds" in keywords:
        keywords["bounds"] = [keywords["bounds"]] * np.size(keywords["x0"])
    return keywords


@pytest.mark.parametrize(
    ("form", "options"), [*((form, "plain") for form in FORMS), *(("together", o) for o in OPTIONS)]
)
def test_same_bits_as_the_ordinary_loop(form, options, advanced):
    if form in ("torch", "jax"):
        pytest.importorskip(form)
    keywords = keywords_of(form, options)
    found = minimize(**keywords)
    assert advanced
    count = len(advanced)
    assert_equal(found, minimize(**keywords, compiled=False))
    assert len(advanced) == count


def test_points_may_be_kept_and_written():
    kept = []

    def fun(x):
        kept.append(x)
        found = both(x.copy())
        if len(kept) % 2:
            x[...] = 7
        return found

    result = minimize(fun, START, jac=True, maxiter=9, learning_rate=0.05, gtol=None)
    assert len({x.ctypes.data for x in kept}) == len(kept) == 10
    assert_equal(result, minimize(both, START, jac=True, maxiter=9, learning_rate=0.05, gtol=None, compiled=False))


def test_large_points_may_be_kept_and_written():
    """A large copy is used again, but never one that anybody can still see."""
    kept, addresses = [], set()

    def fun(x):
        addresses.add(x.ctypes.data)
        found = ((x - 2) ** 2).sum(), 2 * (x - 2)
        number = len(kept)
        kept.append([None, x, x[3:], memoryview(x), None][number % 5])
        if number % 5 == 4:
            x[...] = 7
            x.setflags(write=False)
        return found

    x0 = np.linspace(-1, 1, 20_000)
    result = minimize(fun, x0, jac=True, maxiter=20, learning_rate=0.05, gtol=None)
    plain = minimize(
        lambda x: (((x - 2) ** 2).sum(), 2 * (x - 2)),
        x0,
        jac=True,
        maxiter=20,
        learning_rate=0.05,
        gtol=None,
        compiled=False,
    )
    assert_equal(result, plain)
    whole = [x for x in kept if type(x) is np.ndarray and x.size == 20_000]
    assert len({x.ctypes.data for x in whole}) == len(whole)
    for x, before in zip(whole[1:], whole[:-1], strict=True):
        assert not np.array_equal(x, before)
    assert len(addresses) < 21  # some were used again


def test_large_arrays_with_bounds_and_averages():
    x0 = np.linspace(-1, 1, 40_001)
    keywords = {"jac": True, "maxiter": 15, "learning_rate": 0.3, "gtol": None, "bounds": [(-1.5, 1.2)] * x0.size}
    for options in ({}, {"use_ema": True, "ema_overwrite_frequency": 4}, {"amsgrad": True, "clipvalue": 0.5}):
        found = minimize(lambda x: (((x - 2) ** 2).sum(), 2 * (x - 2)), x0, **keywords, **options)
        plain = minimize(lambda x: (((x - 2) ** 2).sum(), 2 * (x - 2)), x0, **keywords, **options, compiled=False)
        assert_equal(found, plain)


class OddError(Exception):
    pass


@pytest.mark.parametrize("error", [OddError, KeyboardInterrupt, StopIteration, SystemExit])
@pytest.mark.parametrize("nth", [1, 2, 30])
def test_what_the_objective_raises(error, nth):
    results = []
    for compiled in (True, False):
        count = iter(range(1, 10**6))

        def fun(x, count=count):
            if next(count) == nth:
                raise error("here")
            return both(x)

        with pytest.raises(error, match="here") as caught:
            minimize(fun, START, jac=True, learning_rate=0.05, gtol=None, compiled=compiled)
        results.append(caught.value.intermediate_result)
    assert_equal(*results)
    assert results[0].nfev == nth - 1


def test_an_interrupt_before_anything_can_catch_it(monkeypatch):
    """Python may raise it where a function has begun; C, which has called that function, cannot pass it on."""
    evaluate, count = PythonObjective._evaluate, iter(range(1, 10**6))

    def interrupted(self, *addresses):
        if next(count) == 20:
            raise KeyboardInterrupt
        return evaluate(self, *addresses)

    monkeypatch.setattr(PythonObjective, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        minimize(both, START, jac=True, learning_rate=0.05, gtol=None)
    assert caught.value.intermediate_result.nit == 20


def test_a_real_interrupt():
    def fun(x):
        if fun.calls == 25:
            signal.raise_signal(signal.SIGINT)
        fun.calls += 1
        return both(x)

    fun.calls = 0
    with pytest.raises(KeyboardInterrupt):
        minimize(fun, START, jac=True, learning_rate=0.05, gtol=None)
    assert fun.calls == 25


def test_not_a_number_stops():
    def fun(x):
        value, gradient = both(x)
        return (np.nan if x[0] > -0.8 else value), gradient

    keywords = {"jac": True, "learning_rate": 0.05, "gtol": None}
    found = minimize(fun, START, **keywords)
    assert found.status == 3
    assert_equal(found, minimize(fun, START, **keywords, compiled=False))


@pytest.mark.parametrize("limit", ["maxtime", "progress"])
def test_a_slow_objective_is_not_left_alone(limit):
    """After some fast calls, each takes a while: the loop comes back after the first of them."""
    seen, slow = [], []

    def fun(x):
        if len(seen) > 300:
            slow.append(1)
            time.sleep(0.06)
        seen.append(1)
        return both(x)

    if limit == "maxtime":
        result = minimize(fun, START, jac=True, gtol=None, maxtime=0.05, maxiter=10**6)
        assert result.status == 2
        assert len(slow) <= 1
    else:
        minimize(fun, START, jac=True, gtol=None, progress=True, maxiter=303)
        assert len(slow) == 3


def test_a_run_goes_on_after_it_was_saved(tmp_path):
    keywords = {
        "jac": True,
        "learning_rate": schedules.ExponentialDecay(0.05, 10, 0.9),
        "gtol": None,
        "bounds": [(-1, 1.2)] * 7,
    }
    whole = minimize(both, START, maxiter=50, **keywords)
    minimize(both, START, maxiter=23, checkpoint=tmp_path / "run.npz", **keywords)
    assert_equal(minimize(both, START, maxiter=50, checkpoint=tmp_path / "run.npz", **keywords), whole)


def square(x):
    return (x**2).sum(), 2 * x


class Failing:
    def __del__(self):
        raise ValueError("on purpose")


@pytest.mark.parametrize("slow", [0.0, 0.06])
def test_what_others_cannot_raise_is_left_to_the_hook(slow, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    before = sys.unraisablehook

    def fun(x):
        Failing()
        time.sleep(slow)
        return square(x)

    result = minimize(fun, np.ones(3), jac=True, learning_rate=0.05, maxiter=3, gtol=None)
    assert (result.nit, told) == (3, ["on purpose"] * 4)
    assert sys.unraisablehook is before


def test_the_hook_is_as_before_after_runs_in_several_threads():
    before, barrier = sys.unraisablehook, threading.Barrier(2)

    def run(iterations):
        def fun(x):
            if not calls:
                barrier.wait(60)
            calls.append(1)
            time.sleep(0.001)
            return square(x)

        calls = []
        minimize(fun, np.ones(3), jac=True, learning_rate=0.05, maxiter=iterations, gtol=None)

    threads = [threading.Thread(target=run, args=(iterations,)) for iterations in (20, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sys.unraisablehook is before


def test_a_run_is_freed_with_its_result():
    """Without waiting for a collection of garbage."""
    freed = []

    class Function:
        def __call__(self, x):
            return square(x)

    function = Function()
    weakref.finalize(function, freed.append, True)
    gc.disable()
    try:
        minimize(function, np.ones(3), jac=True, learning_rate=0.05, maxiter=5)
        del function
        assert freed
    finally:
        gc.enable()


@pytest.mark.parametrize("compiled", [True, False])
def test_bounds_hold_in_the_users_units(compiled):
    """A point that rounding has put on a bound, while the array in other units is not there."""
    result = minimize(
        lambda x: (0.0, np.array([1e-3])),
        np.array([np.nextafter(-1.3, 9)]),
        jac=True,
        bounds=[(-1.3, None)],
        x_scale=0.7,
        learning_rate=2e-16,
        maxiter=4,
        compiled=compiled,
    )
    assert (result.nit, result.status) == (1, 0)


def test_a_run_that_goes_on_from_nan_recovers(tmp_path):
    def make(fails_at):
        calls = []

        def fun(x):
            calls.append(1)
            if len(calls) == fails_at:
                raise RuntimeError("on purpose")
            return (np.nan if 3 < x[0] < 3.5 else float(((x - 5) ** 2).sum())), 2 * (x - 5)

        return fun

    whole = minimize(make(None), np.zeros(2), jac=True, maxiter=200, gtol=None)
    for fails_at in (12, 18, 21, 28):
        path = tmp_path / f"{fails_at}.npz"
        with pytest.raises(RuntimeError, match="on purpose"):
            minimize(make(fails_at), np.zeros(2), jac=True, maxiter=200, gtol=None, checkpoint=path)
        resumed = minimize(make(None), np.zeros(2), jac=True, maxiter=200, gtol=None, checkpoint=path)
        assert (resumed.status, resumed.nit) == (whole.status, whole.nit)
        np.testing.assert_array_equal(resumed.x, whole.x)
