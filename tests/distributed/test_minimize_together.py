"""One minimization by several ranks, each with a part of the unknowns: that of one process with all of them."""

import math
import os
import signal
import time

import numpy as np
import pytest
from helpers.thread_ranks import on_ranks

import adamw_numba
from adamw_numba.distributed import RankError
from adamw_numba.ranks.words import MOST_WORDS, STATUS
from adamw_numba.schedules import CosineDecay

SIZES = [1, 2, 3, 4, 7]
N = 23
TARGET = np.linspace(-2, 3, N)


class One:
    """One process, as a rank that is alone."""

    rank, size = 0, 1

    def gather(self, row):
        return row[None]


def parts(size):
    """Which unknowns each rank has: of three and more ranks, the second has none."""
    if size < 3:
        return np.array_split(np.arange(N), size)
    found = np.array_split(np.arange(N), size - 1)
    return [found[0], np.arange(0), *found[1:]]


def rounded(values):
    """Numbers whose sum is exact, in whatever order they are added."""
    return np.round(values * 2.0**20) / 2.0**20


# Problems: for a rank, where it starts, its function, and what it says about the value


def separable(ranks):
    own = parts(ranks.size)[ranks.rank]
    target = TARGET[own]

    def fun(x):
        far = x.astype(np.float64) - target
        return float(rounded(far**2 + 0.1 * far**4).sum()), (2 * far + 0.4 * far**3).astype(x.dtype)

    return np.zeros(len(own), np.float32), fun, "sum"


def chain(ranks):
    """Rosenbrock's function, in which each unknown has two neighbours: they come from the other ranks."""
    own = parts(ranks.size)[ranks.rank]

    def whole(x):
        row = np.zeros(N)
        row[own] = x
        return ranks.gather(row).sum(axis=0)

    def fun(x):
        y = whole(x)
        a, b = y[1:] - y[:-1] ** 2, 1 - y[:-1]
        gradient = np.zeros(N)
        gradient[:-1] = -40 * a * y[:-1] - 2 * b
        gradient[1:] += 20 * a
        return math.fsum(10 * a**2 + b**2), gradient[own].astype(x.dtype)

    return np.full(len(own), -0.5, np.float32), fun, "same"


PROBLEMS = {"separable": separable, "chain": chain}


def alone(problem, change=lambda fun, ranks: fun, **options):
    x0, fun, _ = problem(One())
    return adamw_numba.minimize(change(fun, One()), x0, jac=True, compiled=False, **local(options, One()))


def together(size, problem, change=lambda fun, ranks: fun, **options):
    """What each rank has found."""

    def work(ranks):
        x0, fun, value = problem(ranks)
        given = local(options, ranks)
        return adamw_numba.minimize(change(fun, ranks), x0, jac=True, comm=ranks, **{"value": value, **given})

    found = on_ranks(size, work)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def local(options, ranks):
    """Options that each rank has a part of are functions of the ranks, here."""
    return {key: value(ranks) if key in LOCAL else value for key, value in options.items()}


LOCAL = ("bounds", "x_scale", "batches")


def joined(arrays, size):
    found = np.full(N, np.nan, np.float32)
    for own, array in zip(parts(size), arrays, strict=True):
        found[own] = array
    return found


def test_the_stages_above_are_several():
    nits = [alone(problem, **RUNS["auto in stages"]).nit for problem in PROBLEMS.values()]
    assert nits == [400, 400]  # the second begins at 345


def check_same(found, expected, size):
    for key in ("x", "x_last", "jac", "x_average"):
        if key in expected:
            np.testing.assert_array_equal(joined([each[key] for each in found], size), expected[key], err_msg=key)
    for each in found:
        for key in ("fun", "fun_last", "nit", "nfev", "njev", "status", "success", "message"):
            np.testing.assert_equal(each[key], expected[key], err_msg=key)
        for key, column in expected.history.items():
            if key != "time":
                np.testing.assert_array_equal(each.history[key], column, err_msg=key)
        np.testing.assert_array_equal(each.history["time"], found[0].history["time"])


def own_of(array):
    return lambda ranks: array[parts(ranks.size)[ranks.rank]]


RATE = {"learning_rate": 0.1}
RUNS = {
    "maxiter": RATE | {"maxiter": 20},
    "no iteration": RATE | {"maxiter": 0},
    "maxfev": RATE | {"maxfev": 20},
    "gtol": {"learning_rate": 0.01, "gtol": 2.0},
    "ftol": {"learning_rate": 1e-3, "ftol": 1e-2, "gtol": None, "maxiter": 300},
    "xtol": {"learning_rate": CosineDecay(0.1, 100), "xtol": 2e-2, "gtol": None, "maxiter": 300},
    "patience": {"learning_rate": CosineDecay(0.5, 60), "patience": 7, "gtol": None, "maxiter": 300},
    "the best point": {"learning_rate": 2.0, "maxiter": 15},
    "the last point": {"learning_rate": 2.0, "maxiter": 15, "return_best": False},
    "auto": {"maxiter": 60},
    "auto in stages": {
        "maxiter": 3100, "gtol": None, "callback": lambda intermediate_result: intermediate_result.nit == 400,
        "callback_every": 100,
    },
    "bounds": {"maxiter": 60, "bounds": own_of(np.stack([TARGET / 2 - 0.5, TARGET / 2 + 0.2], -1))},
    "x_scale": RATE | {"maxiter": 30, "x_scale": own_of(np.linspace(0.2, 3, N))},
    "x_scale and bounds": RATE | {
        "maxiter": 30, "x_scale": lambda ranks: "bounds", "bounds": own_of(np.stack([TARGET - 1, TARGET + 0.1], -1))
    },
    "a clip": RATE | {"maxiter": 30, "global_clipnorm": 0.5},
    "a clip of each": RATE | {"maxiter": 30, "clipnorm": 0.5},
    "skip": RATE | {"maxiter": 30, "nonfinite": "skip"},
    "an average": RATE | {"maxiter": 30, "use_ema": True, "amsgrad": True, "history": 7},
    "accumulation": RATE | {"maxiter": 30, "gradient_accumulation_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_bits_of_one_process(options, problem, size):
    check_same(together(size, problem, **options), alone(problem, **options), size)


def test_the_runs_above_stop_for_every_reason():
    messages = {alone(problem, **options).message for options in RUNS.values() for problem in PROBLEMS.values()}
    words = ("`gtol`", "`ftol`", "`xtol`", "`patience`", "number of iterations", "evaluations", "raise learning_rate")
    assert [word for word in words if not any(word in message for message in messages)] == []


@pytest.mark.parametrize("size", [2, 3])
def test_float64_is_the_same_to_rounding(size):
    def problem(ranks):
        x0, fun, value = separable(ranks)
        return x0.astype(np.float64), fun, value

    expected = alone(problem, maxiter=200)
    for own, each in zip(parts(size), together(size, problem, maxiter=200), strict=True):
        np.testing.assert_allclose(each.x, expected.x[own], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_that_meets_nan_recovers_in_the_same_way(size):
    """Where the rate is chosen by itself, units become smaller on all ranks."""

    def walled(fun, ranks):
        def limited(x):
            value, gradient = fun(x)
            return (np.nan if (x > 1.2).any() else value), gradient

        return limited

    expected = alone(separable, walled, maxiter=150)
    assert np.isnan(expected.history["fun"]).any()
    assert expected.nit > np.flatnonzero(np.isnan(expected.history["fun"]))[0]
    check_same(together(size, separable, walled, maxiter=150), expected, size)


@pytest.mark.parametrize("size", SIZES)
def test_batches(size):
    def with_batch(fun, ranks):
        def noisy(x, batch):
            value, gradient = fun(x)
            return value + float(rounded(batch).sum()), (gradient + batch).astype(x.dtype)

        return noisy

    def batches(ranks):
        own = parts(ranks.size)[ranks.rank]
        return lambda number: np.random.default_rng(number).standard_normal(N)[own]

    options = {"learning_rate": 0.1, "maxiter": 12, "batches": batches}
    check_same(together(size, separable, with_batch, **options), alone(separable, with_batch, **options), size)


@pytest.mark.parametrize(("values", "total"), [((1e16, 1.0, -1e16), 0.0), ((1e16, -1e16, 1.0), 1.0), ((1, 2, 4), 7.0)])
def test_values_are_added_in_the_order_of_the_ranks(values, total):
    found = on_ranks(3, lambda ranks: called(ranks, {"fun": lambda x: (values[ranks.rank], x), "maxiter": 1}))
    assert [each.fun for each in found] == [total] * 3


def test_numba_functions():
    numba = pytest.importorskip("numba")

    @numba.njit
    def fun(x, target):
        return ((x - target) ** 2).sum(), 2 * (x - target)

    def work(ranks):
        return called(ranks, {"fun": fun, "args": (1.0 + ranks.rank,), "learning_rate": 0.1, "maxiter": 50})

    expected = adamw_numba.minimize(fun, np.ones(4), (2.0,), jac=True, learning_rate=0.1, maxiter=50)
    np.testing.assert_array_equal(on_ranks(2, work)[1].x, expected.x)


def test_a_run_goes_on_from_an_earlier_result():
    expected = alone(separable, learning_rate=0.1, maxiter=20)

    def work(ranks):
        x0, fun, _ = separable(ranks)
        first = adamw_numba.minimize(fun, x0, jac=True, comm=ranks, learning_rate=0.1, maxiter=8)
        return adamw_numba.minimize(fun, first, jac=True, comm=ranks, learning_rate=0.1, maxiter=12)

    found = on_ranks(3, work)
    np.testing.assert_array_equal(joined([each.x for each in found], 3), expected.x)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_through_scipy(size):
    scipy_minimize = pytest.importorskip("scipy.optimize").minimize
    expected = alone(separable, learning_rate=0.1, maxiter=20)

    def work(ranks):
        x0, fun, _ = separable(ranks)
        options = {"learning_rate": 0.1, "maxiter": 20, "comm": ranks, "value": "sum"}
        return scipy_minimize(fun, x0, jac=True, method=adamw_numba.minimize, options=options)

    check_same(on_ranks(size, work), expected, size)


# Containers, and ranks that have nothing


def nested(ranks, with_shared):
    """Several arrays, of which all ranks have one: its gradient is added over all of them."""
    own = parts(ranks.size)[ranks.rank]
    target = TARGET[own]

    def fun(x):
        level = float(x["shared"][0]) if with_shared else 0.0
        far = x["own"].astype(np.float64) - target + level
        row = np.zeros(N)
        row[own] = rounded(2 * far)
        found = {"own": (2 * far).astype(np.float32)}
        if with_shared:
            found["shared"] = np.array([ranks.gather(row).sum(), 2 * x["shared"][1]], np.float32)
        value = float(rounded(far**2).sum())
        # What is replicated counts once.
        return value + float(x["shared"][1] ** 2) * (with_shared and ranks.rank == 0), found

    x0 = {"own": np.zeros(len(own), np.float32)}
    return x0 | ({"shared": np.array([0.5, 2.0], np.float32)} if with_shared else {}), fun


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"maxiter": 40}, {"global_clipnorm": 0.1, "learning_rate": 0.1, "maxiter": 40}])
def test_replicated_arrays(options, size):
    def work(ranks):
        x0, fun = nested(ranks, with_shared=True)
        return adamw_numba.minimize(fun, x0, jac=True, comm=ranks, replicated=["^shared$"], **options)

    x0, fun = nested(One(), with_shared=True)
    expected = adamw_numba.minimize(fun, x0, jac=True, compiled=False, **options)
    found = on_ranks(size, work)
    np.testing.assert_array_equal(joined([each.x["own"] for each in found], size), expected.x["own"])
    for each in found:
        np.testing.assert_array_equal(each.x["shared"], expected.x["shared"])
        assert (each.nit, each.message) == (expected.nit, expected.message)
        assert each.fun == pytest.approx(expected.fun, rel=1e-6)


NOTHING = {
    "an empty array": lambda: np.zeros(0),
    "an empty matrix": lambda: np.zeros((0, 3)),
    "a dict": dict,
    "a list": list,
    "an empty array in a dict": lambda: {"w": np.zeros(0)},
}


@pytest.mark.parametrize("jac", [True, "torch", "jax", "a function"])
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("options", [{"maxiter": 3200}, {"use_ema": True, "amsgrad": True, "maxiter": 5, "ftol": 0.1}])
def test_a_rank_without_unknowns(nothing, jac, options):
    if jac in ("torch", "jax"):
        pytest.importorskip(jac)

    def value_of(x):
        return (x**2).sum()

    def work(ranks):
        if ranks.rank == 1:
            gradient = (lambda x: x) if jac == "a function" else jac
            # Its value counts.
            fun = (lambda x: (2.0, x)) if jac is True else lambda x: 2.0
            return adamw_numba.minimize(fun, nothing(), jac=gradient, comm=ranks, **options)
        gradient = (lambda x: 2 * x) if jac == "a function" else jac
        fun = (lambda x: (value_of(x), 2 * x)) if jac is True else value_of
        return adamw_numba.minimize(fun, np.ones(2), jac=gradient, comm=ranks, **options)

    first, second = on_ranks(2, work)
    if options["maxiter"] > 5:
        np.testing.assert_allclose(first.x, 0, atol=1e-5)
        assert first.fun == second.fun == pytest.approx(2)
    assert (first.nit, first.status, first.message) == (second.nit, second.status, second.message)
    expected = nothing()
    assert type(second.x) is type(expected)
    assert np.shape(second.x) == np.shape(expected)


@pytest.mark.parametrize("nothing", [np.zeros(0), {}, [np.zeros((0, 2))]], ids=["array", "dict", "list"])
def test_no_rank_has_unknowns(nothing):
    errors = on_ranks(2, lambda ranks: adamw_numba.minimize(lambda x: (0.0, x), nothing, jac=True, comm=ranks))
    for error in errors:
        assert isinstance(error, ValueError)
        assert "`x0` is empty on all ranks" in str(error)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_arrays_of_other_libraries(library):
    xp = pytest.importorskip("torch" if library == "torch" else "jax.numpy")
    asarray = xp.asarray

    def work(ranks):
        own = TARGET[parts(ranks.size)[ranks.rank]].astype(np.float32)
        target = asarray(own)
        return adamw_numba.minimize(
            lambda x: (float(((x - target) ** 2).sum()), 2 * (x - target)), asarray(np.zeros_like(own)), jac=True,
            comm=ranks, maxiter=50,
        )  # fmt: skip

    (expected,) = on_ranks(1, work)
    found = on_ranks(3, work)
    assert all(type(each.x) is type(expected.x) for each in found)
    np.testing.assert_allclose(joined([np.asarray(each.x) for each in found], 3), np.asarray(expected.x), rtol=1e-6)


def test_a_clip_of_immutable_arrays_is_refused():
    jnp = pytest.importorskip("jax.numpy")
    for key, value in {"clipnorm": 1.0, "global_clipnorm": 1.0, "nonfinite": "skip"}.items():
        errors = on_ranks(
            2,
            lambda ranks, given={key: value}: adamw_numba.minimize(
                lambda x: (0.0, x), jnp.ones(2), jac=True, comm=ranks, **given
            ),
        )
        assert all(isinstance(error, ValueError) and f"`{key}` is" in str(error) for error in errors)


# Stopping


def stops_by_error(run):
    raise StopIteration


HOW = {"an exception": stops_by_error, "True": lambda run: True, "a NumPy bool": lambda run: np.True_}


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("everywhere", [True, False], ids=["on all ranks", "on one rank"])
def test_a_callback_that_stops_on_one_rank(everywhere, how, at):
    calls = []

    def work(ranks):
        x0, fun, value = separable(ranks)

        def callback(intermediate_result):
            calls.append((intermediate_result.nit, intermediate_result.fun, intermediate_result.x.shape == x0.shape))
            return how(None) if ranks.rank == at and intermediate_result.nit == 6 else "nothing"

        given = callback if everywhere or ranks.rank == at else None
        return adamw_numba.minimize(
            fun, x0, jac=True, comm=ranks, value=value, callback=given, learning_rate=0.1, callback_every=2
        )

    found = on_ranks(3, work)
    expected = alone(separable, learning_rate=0.1, maxiter=6)
    check_same([each | {"status": 1, "message": expected.message} for each in map(_Result, found)], expected, 3)
    assert {(each.status, each.nit) for each in found} == {(99, 6)}
    values = expected.history["fun"]
    one_rank = [(nit, values[nit], True) for nit in (2, 4, 6)]
    assert sorted(calls) == sorted(one_rank * (3 if everywhere else 1))


class _Result(dict):
    """A result of which some fields can be replaced."""

    __getattr__ = dict.__getitem__

    def __or__(self, other):
        return _Result({**self, **other})


@pytest.mark.parametrize("slow", range(2))
def test_the_slowest_rank_decides_on_the_time(slow):
    def delayed(fun, ranks):
        def waiting(x):
            time.sleep(0.02 if ranks.rank == slow else 0)
            return fun(x)

        return waiting

    found = together(2, separable, delayed, learning_rate=0.1, maxtime=0.3)
    assert {(each.status, each.message) for each in found} == {(2, "Maximum time has been exceeded. " + MOVING)}
    assert found[0].nit == found[1].nit < 20


MOVING = "x was still moving by about learning_rate at each step: raise learning_rate or maxiter."


@pytest.mark.parametrize("evaluation", [0, 1, 7])
@pytest.mark.parametrize("bad", ["value", "gradient", "infinite value"])
@pytest.mark.parametrize("at", range(3))
def test_nan_on_one_rank(at, bad, evaluation):
    def broken(fun, ranks):
        calls = iter(range(1000))

        def breaking(x):
            value, gradient = fun(x)
            if next(calls) == evaluation and ranks.rank == at:
                value = {"value": np.nan, "infinite value": np.inf}.get(bad, value)
                gradient = np.full_like(gradient, np.nan if bad == "gradient" else 1)
            return value, gradient

        return breaking

    if at == 1 and bad == "gradient":
        return  # it has none
    found = together(3, separable, broken, learning_rate=0.1, maxiter=20)
    assert {(each.status, each.nit) for each in found} == {(3, evaluation)}
    if evaluation:
        best = alone(separable, learning_rate=0.1, maxiter=evaluation - 1)
        np.testing.assert_array_equal(joined([each.x for each in found], 3), best.x)
        assert {each.fun for each in found} == {best.fun}


@pytest.mark.parametrize("at", [0, 2])
def test_nan_on_one_rank_is_skipped_on_all(at):
    def broken(fun, ranks):
        calls = iter(range(1000))

        def breaking(x):
            value, gradient = fun(x)
            return value, gradient * (np.nan if next(calls) in (2, 5) and ranks.rank == at else 1)

        return breaking

    found = together(3, separable, broken, learning_rate=0.1, maxiter=9, nonfinite="skip", gtol=None)
    assert {each.nit for each in found} == {9}
    assert {int(each.state["iteration"]) for each in found} == {7}


@pytest.mark.parametrize("at", range(3))
def test_nan_on_one_rank_can_be_an_error(at):
    def fun(ranks):
        calls = iter(range(100))
        return lambda x: (1.0, x * (np.nan if next(calls) == 3 and ranks.rank == at else 1))

    options = {"nonfinite": "raise", "gtol": None}
    for rank, error in enumerate(on_ranks(3, lambda ranks: called(ranks, {"fun": fun(ranks), **options}))):
        assert type(error) is (FloatingPointError if rank == at else RankError)
        assert "gradients of ['0'] hold values that are not finite" in str(error)
        assert error.intermediate_result.nit == 3


# Errors


class _WrongError(Exception):
    pass


def failing_at(place, rank, evaluation, error):
    """What makes a minimization fail on one rank in one place."""

    def arguments(ranks):
        x0, fun, _ = separable(ranks)
        counts = {"n": -1}

        def fails():
            counts["n"] += 1
            if ranks.rank == rank and counts["n"] == evaluation:
                raise error

        def counting(x):
            if place == "fun":
                fails()
            return fun(x)[0]

        def gradient(x):
            if place == "jac":
                fails()
            return fun(x)[1]

        given = {"jac": gradient, "learning_rate": 0.1, "maxiter": 8, "gtol": None}
        if place == "callback":
            given["callback"] = lambda xk: fails()
        if place == "progress":
            given["progress"] = lambda intermediate_result: fails()
        if place == "learning_rate":
            given["learning_rate"] = lambda: fails() or 0.1
        if place == "the last callback":
            counts["n"] = 0
            given["callback"] = lambda intermediate_result: intermediate_result.nit == 8 and fails()
        return counting, x0, given

    return arguments


PLACES = [
    *((place, at) for place in ("fun", "jac") for at in (0, 1, 5, 8)),
    *((place, at) for place in ("callback", "progress") for at in (0, 1, 6)),
    ("learning_rate", 3),
    ("the last callback", 1),
]


@pytest.mark.parametrize("kind", [_WrongError, KeyboardInterrupt, StopIteration])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(("place", "evaluation"), PLACES)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["plain", "clip"])
def test_an_error_on_one_rank_ends_all(clip, place, evaluation, at, kind):
    if kind is StopIteration and "callback" in place:
        return
    arguments = failing_at(place, at, evaluation, kind("by intent"))

    def work(ranks):
        fun, x0, options = arguments(ranks)
        try:
            return adamw_numba.minimize(fun, x0, comm=ranks, **options, global_clipnorm=clip)
        except BaseException as error:
            ranks.gather(np.zeros(1))  # all are there
            return error

    for rank, error in enumerate(on_ranks(3, work)):
        if rank == at:
            assert type(error) is kind
        else:
            assert type(error) is RankError
            assert str(error) == f"rank {at}: {kind.__name__}: by intent (all ranks have stopped)"
        assert "at iteration" in "".join(error.__notes__)
        assert error.intermediate_result.nit <= 8


def test_an_error_after_the_last_iteration_ends_all():
    def work(ranks):
        x0, fun, _ = separable(ranks)

        def progress(intermediate_result):
            if ranks.rank == 1 and intermediate_result.nit == 4:
                raise _WrongError

        return adamw_numba.minimize(fun, x0, jac=True, comm=ranks, maxiter=4, progress=progress)

    assert [type(each) for each in on_ranks(2, work)] == [RankError, _WrongError]


WRONG = {
    "x0": ({"x0": "text"}, TypeError, "text"),
    "x0 that is NaN": ({"x0": np.array([np.nan])}, ValueError, "NaN"),
    "an option": ({"maxiter": -1}, ValueError, "maxiter"),
    "value": ({"value": "mean"}, ValueError, "value"),
    "replicated": ({"replicated": ["("]}, ValueError, "replicated"),
    "replicated that are no list": ({"replicated": "w"}, TypeError, "replicated"),
    "a callback": ({"callback": 3}, TypeError, "`callback` is 3"),
    "a bound": ({"bounds": [(2, 1)] * 4}, ValueError, "bounds"),
    "the function": ({"fun": 3}, TypeError, "`fun` is 3"),
    "a state": ({"state": {}}, ValueError, "`state` lacks"),
    "a hyperparameter": ({"beta_1": 2.0}, ValueError, "beta_1"),
    "a gradient": ({"fun": lambda x: (0.0, np.zeros(9))}, ValueError, "has shape"),
    "no value": ({"fun": lambda x: ("text", x)}, TypeError, "text"),
    "differences": ({"jac": None}, ValueError, "`jac` is None and `comm` is given"),
    "3-point": ({"jac": "3-point"}, ValueError, "`jac` is '3-point' and `comm` is given"),
    "polish": ({"polish": True}, ValueError, "`polish` is {} and `comm` is given; expected None"),
    "a checkpoint": ({"checkpoint": "run.npz"}, ValueError, "`checkpoint` is 'run.npz' and `comm` is given; expected None"),
}  # fmt: skip


def called(ranks, changed):
    given = {"fun": lambda x: (float((x**2).sum()), 2 * x), "x0": np.ones(4), "jac": True, **changed}
    return adamw_numba.minimize(given.pop("fun"), given.pop("x0"), comm=ranks, **given)


@pytest.mark.parametrize("where", [(0,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument(case, where):
    changed, kind, message = WRONG[case]
    found = on_ranks(3, lambda ranks: called(ranks, changed if ranks.rank in where else {}))
    for rank, error in enumerate(found):
        assert message in str(error)
        assert type(error) is (kind if rank in where else RankError)
        assert rank in where or f"rank {where[0]}: {kind.__name__}: " in str(error)


DIFFERENT = {
    "maxiter": ({"maxiter": 20}, "the arguments differ: maxiter is 10000 on ranks 0, 2, 20 on rank 1"),
    "maxfev": ({"maxfev": 20}, "maxfev is None on ranks 0, 2, 20 on rank 1"),
    "maxtime": ({"maxtime": 20}, "maxtime is None on ranks 0, 2, 20"),
    "gtol": ({"gtol": 0.5}, "gtol is 1e-05 on ranks 0, 2, 0.5 on rank 1"),
    "tol": ({"tol": 0.5}, "gtol is 1e-05 on ranks 0, 2, 0.5 on rank 1"),
    "ftol": ({"ftol": 0.5}, "ftol is None on ranks 0, 2, 0.5 on rank 1"),
    "xtol": ({"xtol": 0.5}, "xtol is None on ranks 0, 2, 0.5 on rank 1"),
    "patience": ({"patience": 5}, "patience is None on ranks 0, 2, 5 on rank 1"),
    "nonfinite": ({"nonfinite": "skip"}, "nonfinite is 'stop' on ranks 0, 2, 'skip' on rank 1"),
    "return_best": ({"return_best": False}, "return_best is None on ranks 0, 2, False on rank 1"),
    "callback_every": ({"callback_every": 2}, "callback_every is 1 on ranks 0, 2, 2 on rank 1"),
    "value": ({"value": "same"}, "value is 'sum' on ranks 0, 2, 'same' on rank 1"),
    "replicated": ({"replicated": ["w"]}, "replicated is [] on ranks 0, 2, ['w'] on rank 1"),
    "batches": ({"batches": lambda n: 0.0, "fun": lambda x, b: (0.0, x)}, "batches is False on ranks 0, 2, True on rank 1"),
    "a learning rate": ({"learning_rate": 0.1}, "automatic is True on ranks 0, 2, False on rank 1"),
    "a hyperparameter": ({"beta_2": 0.5}, "beta_2 is None on ranks 0, 2, 0.5 on rank 1"),
    "a clip": ({"clipnorm": 0.5}, "clipnorm is None on ranks 0, 2, 0.5 on rank 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_arguments_that_differ(case):
    changed, message = DIFFERENT[case]
    for error in on_ranks(3, lambda ranks: called(ranks, changed if ranks.rank == 1 else {})):
        assert type(error) is RankError
        assert message in str(error)
        assert "expected the same on all ranks" in str(error)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_rates_that_differ(clip):
    """They are no arguments, but what a function returns."""
    rates = {0: lambda step: 0.1, 1: lambda step: 0.1 if step < 3 else 0.2}
    errors = on_ranks(2, lambda ranks: called(ranks, {"learning_rate": rates[ranks.rank], "global_clipnorm": clip}))
    for error in errors:
        assert type(error) is RankError
        assert "the learning rates differ: 0.1 on rank 0, 0.2 on rank 1" in str(error)
        assert error.intermediate_result.nit == (3 if clip else 4)


def test_iterations_that_differ():
    state = called(One(), {"maxiter": 4}).state
    own = on_ranks(2, lambda ranks: called(ranks, {"state": state} if ranks.rank else {}))
    assert all("the iterations differ: 0 on rank 0, 4 on rank 1" in str(error) for error in own)


def test_values_that_differ():
    def work(ranks):
        return called(ranks, {"value": "same", "fun": lambda x: (1.0 + ranks.rank // 2, 2 * x)})

    for error in on_ranks(3, work):
        assert type(error) is RankError
        assert "the values of `fun` differ: 1.0 on ranks 0, 1, 2.0 on rank 2; expected the same" in str(error)


@pytest.mark.parametrize("what", ["values", "gradients", "shapes", "later gradients"])
def test_replicated_arrays_that_differ(what):
    def work(ranks):
        bad = ranks.rank == 1
        shared = np.ones(3 if bad and what == "shapes" else 2) + (bad and what == "values")
        calls = iter(range(100))

        def fun(x):
            is_now = what == "gradients" or (what == "later gradients" and next(calls) == 3)
            return 0.0, {"w": 2 * x["w"], "b": 1 + 0 * x["b"] + 1e-9 * (bad and is_now)}

        x0 = {"w": np.ones(2), "b": shared}
        return adamw_numba.minimize(fun, x0, jac=True, comm=ranks, replicated=["^b$"], learning_rate=0.1, maxiter=10)

    message = f"the {'gradients of the ' * ('gradient' in what)}replicated variables differ: "
    for error in on_ranks(3, work):
        assert type(error) is RankError
        assert str(error).startswith(message)


def test_what_is_replicated_counts_once_in_the_message():
    """The replicated gradient points one way, the others to and fro: three times the first would be the most."""

    def work(ranks):
        calls = iter(range(100))

        def fun(x):
            return 0.0, {"w": (-1.0) ** next(calls) * np.ones_like(x["w"]), "b": np.ones(1)}

        x0 = {"w": np.zeros(3 * (ranks.rank == 0)), "b": np.zeros(1)}
        return adamw_numba.minimize(fun, x0, jac=True, comm=ranks, replicated=["^b$"], learning_rate=0.1, maxiter=50)

    assert {each.message for each in on_ranks(3, work)} == {"Maximum number of iterations has been exceeded."}


@pytest.mark.parametrize("comm", [3, "world", object(), [1], adamw_numba.AdamW])
def test_what_is_no_communicator(comm):
    with pytest.raises(TypeError, match=r"`comm` is .*; expected a communicator of mpi4py, a process group"):
        called(comm, {})
    if comm == 3:
        with pytest.raises(ValueError, match=r"`comm` is 3; expected None: one process minimizes from a start"):
            adamw_numba.multistart(lambda x: (0.0, x), [np.ones(2)], jac=True, comm=comm)


def test_a_value_that_is_neither():
    with pytest.raises(ValueError, match="value"):
        called(None, {"value": "mean"})


# Interrupts


class _Counting(One):
    """Interrupts this process in the middle of some messages."""

    def __init__(self, at):
        self.at, self.rows = at, []

    def gather(self, row):
        self.rows.append(row.copy())
        if len(self.rows) - 1 in self.at:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the handler runs here
                pass
        return row[None]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("at", range(18))
def test_an_interrupt_in_the_middle_of_a_decision_waits_for_its_end(at, clip):
    """A rank that left alone would let the others wait: it tells them with its next row."""
    options = {"maxiter": 12, "gtol": None, "learning_rate": 0.1, "global_clipnorm": clip}
    called(calm := _Counting([]), options)
    ranks = _Counting([at])
    with pytest.raises(KeyboardInterrupt):
        called(ranks, options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if at == len(calm.rows) - 1:  # in the last decision of all: nobody waits
        assert len(ranks.rows) == len(calm.rows)
        return
    *before, failed, length, text = ranks.rows
    assert failed[STATUS] == 1
    assert [length.size, text.size] == [1, len("KeyboardInterrupt: ")]
    assert len(failed) == MOST_WORDS
    start = 5  # messages: the arguments, the overrides, the variables, and their names
    assert len(before) == (at + 1 if at in (0, *range(start - 1, 18)) else start)


def test_the_third_interrupt_does_not_wait():
    ranks = _Counting([])

    def gather(row):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        raise AssertionError("it has waited")

    ranks.gather = gather
    with pytest.raises(KeyboardInterrupt):
        called(ranks, {})


# What is sent, and what is shown


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("options", "per_iteration"),
    [({}, 1), ({"callback": lambda xk: None}, 2), ({"global_clipnorm": 0.5}, 2), ({"clipnorm": 0.5}, 3)],
)
def test_one_row_for_each_evaluation(options, per_iteration, size):
    sent = {}

    def work(ranks, maxiter):
        x0, fun, _ = separable(ranks)
        adamw_numba.minimize(fun, x0, jac=True, comm=ranks, learning_rate=0.1, maxiter=maxiter, **options)
        sent[maxiter] = ranks.messages

    for maxiter in (4, 14):
        assert on_ranks(size, lambda ranks, n=maxiter: work(ranks, n)) == [None] * size
    assert len(sent[14]) - len(sent[4]) == 10 * per_iteration
    assert max(sent[14][-10:]) == MOST_WORDS
    assert MOST_WORDS * 8 <= 168


def test_one_rank_prints(capsys):
    together(3, separable, learning_rate=CosineDecay(0.3, 300), maxiter=300, gtol=1e-2, disp=True)
    printed = capsys.readouterr().out
    assert printed.count("Current function value") == printed.count("terminated successfully") == 1


def test_one_rank_has_a_bar(monkeypatch):
    tqdm = pytest.importorskip("tqdm.auto")
    made = []
    monkeypatch.setattr(tqdm, "tqdm", lambda *args, bar=tqdm.tqdm, **given: made.append(1) or bar(*args, **given))
    together(3, separable, maxiter=10, progress=True)
    assert made == [1]


def test_nothing_changes_without_a_communicator():
    """`value` and `replicated` say nothing of one process."""
    expected = alone(separable, maxiter=30)
    x0, fun, _ = separable(One())
    found = adamw_numba.minimize(fun, x0, jac=True, maxiter=30, value="same", replicated=["w"])
    np.testing.assert_array_equal(found.x, expected.x)
