"""`adamw_numba.njit.minimize`: the bits of `adamw_numba.minimize` and `multistart`, from users' own compiled code."""

import math

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

import adamw_numba
from adamw_numba.minimizer import stopping
from adamw_numba.njit import Result, minimize
from adamw_numba.njit.arguments import limits_of
from adamw_numba.schedules import CosineDecay


@njit
def valley(x, a):
    u, w = x[1] - x[0] * x[0], 1 - x[0]
    return a * u * u + w * w, np.array([-4 * a * u * x[0] - 2 * w, 2 * a * u])


@njit
def bowl(x, center):
    return ((x - center) ** 2).sum(), 2 * (x - center)


@njit
def filled_bowl(x, gradient, center):
    total = 0.0
    for i, value in enumerate(x.flat):
        total += (value - center) ** 2
        gradient.flat[i] += 2 * (value - center)
    x[...] = np.nan  # it has a copy
    return total


@njit
def bowl_value(x, center):
    return ((x - center) ** 2).sum()


@njit
def bowl_gradient(x, center):
    return 2 * (x - center)


@njit
def cliff(x):
    """NaN beyond 1, where the minimum of what is finite lies."""
    return -np.log(1 - x[0]) - 20 * x[0], np.array([1 / (1 - x[0]) - 20])


@njit
def waves(x):
    return (np.cos(3 * x) + x**2 / 9).sum(), -3 * np.sin(3 * x) + 2 * x / 9


def same(found, wanted):
    """Whether a result has the bits of one of Python's."""
    assert isinstance(found.x, np.ndarray)
    assert (found.x.dtype, found.x.shape) == (wanted.x.dtype, wanted.x.shape)
    assert (found.nit, found.status) == (wanted.nit, wanted.status)
    assert found.x.tobytes() == wanted.x.tobytes(), (found.x, wanted.x)
    return found.fun == wanted.fun or (math.isnan(found.fun) and math.isnan(wanted.fun))


# A number for each option: they are compiled once.


@njit
def with_numbers(x0, a, rate, maxiter, gtol, ftol, xtol, patience, maxfev, decay, beta_1, beta_2, epsilon):
    return minimize(
        valley, x0, (a,), rate, maxiter, gtol=gtol, ftol=ftol, xtol=xtol, patience=patience, maxfev=maxfev,
        weight_decay=decay, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon,
    )  # fmt: skip


USUAL = {
    "learning_rate": 0.05,
    "maxiter": 700,
    "gtol": 1e-9,
    "ftol": 0.0,
    "xtol": 0.0,
    "patience": 700,
    "maxfev": 9999,
    "weight_decay": 0.0,
    "beta_1": 0.9,
    "beta_2": 0.99,
    "epsilon": 1e-7,
}
STOPS = {
    "maxiter": ({}, 1),
    "no iteration": ({"maxiter": 0}, 1),
    "one iteration": ({"maxiter": 1}, 1),
    "gradient": ({"gtol": 1e-2, "maxiter": 5000}, 0),
    "function": ({"ftol": 1e-6, "maxiter": 5000}, 0),
    "step": ({"xtol": 1e-3, "maxiter": 5000}, 0),
    "patience": ({"patience": 7}, 0),
    "evaluations": ({"maxfev": 300}, 2),
    "decay": ({"weight_decay": 0.5}, 1),
    "betas": ({"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3}, 1),
    "not finite": ({"learning_rate": 1e200}, 3),
}


@pytest.mark.parametrize("case", STOPS)
def test_numbers_and_reasons_to_stop(case):
    changes, status = STOPS[case]
    options = USUAL | changes
    found = with_numbers(np.array([-1.2, 1.0]), 100.0, *options.values())
    assert same(found, adamw_numba.minimize(valley, [-1.2, 1.0], (100.0,), jac=True, **options))
    assert found.status == status
    assert type(found).__name__ == "Result"


def test_nothing_but_x0_is_shared_with_the_caller():
    x0 = np.array([-1.2, 1.0])
    found = with_numbers(x0, 100.0, *USUAL.values())
    assert x0.tolist() == [-1.2, 1.0]
    assert not np.shares_memory(found.x, x0)


# Forms of the objective, of x and of what is asked for, in Python: each is compiled.

FORMS = {
    "automatic": (valley, [-1.2, 1.0], (100.0,), {"maxiter": 500}, {}),
    "without a limit": (valley, [-1.2, 1.0], (100.0,), {"maxiter": math.inf}, {}),
    "in stages": (valley, [-1.2, 1.0], (100.0,), {"gtol": None, "maxiter": 4000}, {}),
    "from NaN back": (cliff, [0.0], (), {"maxiter": 400}, {}),
    "fills": (filled_bowl, [0.0, 1.0], (3.0,), {"learning_rate": 0.1}, {}),
    "two functions": (bowl_value, [0.0, 1.0], (3.0,), {"learning_rate": 0.1, "jac": bowl_gradient}, {}),
    "float32": (bowl, np.zeros(5, np.float32), (np.float32(3.1),), {"learning_rate": 0.1}, {}),
    "automatic in float32": (bowl, np.zeros((2, 3), np.float32), (np.float32(3.1),), {"maxiter": 300}, {}),
    "integers in Fortran order": (bowl, np.asfortranarray([[1, 2, 3], [4, 5, 6]]), (3.0,), {"learning_rate": 0.1}, {}),
    "an argument alone": (bowl, np.zeros(3), 2.0, {"learning_rate": 0.1}, {}),
    "an array as argument": (bowl, np.zeros(4), (np.arange(8.0)[::2],), {"learning_rate": 0.1}, {}),
    "bounds": (valley, [-1.2, 1.0], (100.0,), {"learning_rate": 0.01}, {"lower": -0.5, "upper": np.array([0.7, 2.0])}),
    "automatic within bounds": (valley, [-1.2, 1.0], (100.0,), {}, {"lower": -0.5, "upper": 0.5}),
    "float32 within bounds": (
        bowl, np.ones(2, np.float32), (np.float32(0.1),), {"learning_rate": 0.1}, {"lower": 0.7, "upper": np.array([np.inf, 0.7])},
    ),
    "every option": (
        valley, [-1.2, 1.0], (100.0,),
        {"learning_rate": 0.02, "maxiter": 600, "amsgrad": True, "nesterov": True, "clipvalue": 3.0, "decouple_lr": True,
         "epsilon_mode": "corrected", "weight_decay": 1e-6}, {},
    ),
    "large": (bowl, np.linspace(-1, 1, 3000), (0.3,), {"learning_rate": 0.1, "maxiter": 50}, {}),
}  # fmt: skip
THOROUGH = [pytest.mark.slow, pytest.mark.thorough]
QUICK = ("automatic", "without a limit", "fills", "float32 within bounds", "every option")


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=THOROUGH) for case in FORMS])
def test_forms(case):
    fun, x0, args, options, bounds = FORMS[case]
    found = minimize(fun, np.asarray(x0), args, **options, **bounds)
    wanted = {"jac": True, **options}
    if bounds:
        shape = np.shape(x0)
        pairs = [np.broadcast_to(bounds[side], shape) for side in ("lower", "upper")]
        wanted["bounds"] = list(zip(*pairs, strict=True))
    assert same(found, adamw_numba.minimize(fun, x0, args, **wanted))
    assert isinstance(found, Result) or type(found).__name__ == "Result"


@pytest.mark.slow
def test_rates_in_an_array_and_of_a_function():
    schedule = CosineDecay(0.1, 300)
    wanted = adamw_numba.minimize(bowl, [0.0, 1.0], (3.0,), jac=True, learning_rate=schedule, maxiter=300, gtol=None)
    rates = np.array([schedule(step) for step in range(300)])
    assert same(minimize(bowl, np.array([0.0, 1.0]), (3.0,), rates, 300, gtol=None), wanted)
    halved = njit(lambda step: 0.1 * 0.5 ** (step // 100))
    wanted = adamw_numba.minimize(
        bowl,
        [0.0, 1.0],
        (3.0,),
        jac=True,
        learning_rate=lambda step: 0.1 * 0.5 ** (step // 100),
        maxiter=300,
        gtol=None,
    )
    assert same(minimize(bowl, np.array([0.0, 1.0]), (3.0,), halved, 300, gtol=None), wanted)


# Many at once


@njit(parallel=True)
def from_everywhere(starts):
    points, values = np.empty_like(starts), np.empty(len(starts))
    counts = np.empty((len(starts), 2), np.int64)
    for k in prange(len(starts)):
        found = minimize(waves, starts[k], (), 0.05, 600, gtol=1e-3)
        points[k] = found.x
        values[k] = found.fun
        counts[k, 0], counts[k, 1] = found.nit, found.status
    return points, values, counts


def test_a_hundred_in_parallel_are_those_of_multistart():
    starts = np.random.default_rng(0).uniform(-6, 6, size=(100, 2))
    best = adamw_numba.multistart(waves, starts, jac=True, learning_rate=0.05, maxiter=600, gtol=1e-3)
    points, values, counts = from_everywhere(starts)
    order = np.argsort(values, kind="stable")
    assert [result.fun for result in best.results] == values[order].tolist()
    assert [(result.nit, result.status) for result in best.results] == [tuple(row) for row in counts[order].tolist()]
    assert np.array([result.x for result in best.results]).tobytes() == points[order].tobytes()
    assert len(set(counts[:, 0].tolist())) > 1


# Errors


@njit
def raises_later(x, limit):
    if x[0] > limit:
        raise ZeroDivisionError("far enough")
    return -x[0], -np.ones_like(x)


@pytest.mark.parametrize("limit", [-1.0, 0.5])
def test_what_the_objective_raises(limit):
    with pytest.raises(ZeroDivisionError, match="far enough"):
        minimize(raises_later, np.zeros(2), (limit,), 0.1)


@njit
def wrong_shape(x, limit):
    return -x[0], -np.ones(3 if x[0] > limit else 2)


@pytest.mark.slow
def test_a_gradient_of_another_shape():
    with pytest.raises(ValueError, match=r"the gradient has another shape than `x`; expected the same"):
        minimize(wrong_shape, np.zeros(2), (0.5,), 0.1)


@pytest.mark.slow
def test_what_a_rate_raises():
    def rate(step):
        if step == 7:
            raise ZeroDivisionError("seven")
        return 0.1

    with pytest.raises(ZeroDivisionError, match="seven"):
        minimize(bowl, np.zeros(2), (3.0,), njit(rate))
    with pytest.raises(ValueError, match=r"`learning_rate` must be a finite float >= 0 at each step.*-1.0, 3"):
        minimize(bowl, np.zeros(2), (3.0,), njit(lambda step: 2.0 - step))


WRONG_NUMBERS = {
    "learning_rate": -0.1,
    "maxiter": -1,
    "gtol": -1.0,
    "ftol": math.nan,
    "xtol": -2.0,
    "patience": 0,
    "maxfev": 0,
    "weight_decay": -0.5,
    "beta_1": 1.0,
    "beta_2": math.nan,
    "epsilon": 0.0,
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_numbers(name):
    options = USUAL | {name: WRONG_NUMBERS[name]}
    with pytest.raises(ValueError, match=rf"`{name}`.* must be .*Received") as error:
        with_numbers(np.array([-1.2, 1.0]), 100.0, *options.values())
    assert repr(float(WRONG_NUMBERS[name])) in str(error.value).replace(
        repr(WRONG_NUMBERS[name]), repr(float(WRONG_NUMBERS[name]))
    )


@pytest.mark.parametrize("name", ["patience", "maxiter", "maxfev"])
def test_limits_that_are_not_whole(name):
    """The loop would wait for them in vain."""
    limits = {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "patience": 2.0, "maxiter": math.inf, "maxfev": 2.0}
    function = njit(lambda *limits: limits_of(*limits))
    assert function(*limits.values())[stopping.MAXITER] == math.inf
    with pytest.raises(ValueError, match=rf"`{name}` must be an integer.*2.5"):
        function(*(limits | {name: 2.5}).values())


@pytest.mark.parametrize(
    ("x0", "message"), [([], "`x0` is empty"), ([0.0, math.inf], r"`x0` must hold finite.*inf, 1")]
)
def test_wrong_starts(x0, message):
    with pytest.raises(ValueError, match=message):
        with_numbers(np.array(x0), 100.0, *USUAL.values())


@pytest.mark.slow
def test_wrong_bounds_and_rates():
    with pytest.raises(ValueError, match=r"`lower` must be <= `upper`.*1.0, 0.0, 0"):
        minimize(bowl, np.zeros(2), (3.0,), 0.1, lower=1.0, upper=0.0)
    with pytest.raises(ValueError, match=r"`lower` and `upper` must have the shape of `x0`.*\(3,\), \(2,\)"):
        minimize(bowl, np.zeros(2), (3.0,), 0.1, lower=np.zeros(3))
    with pytest.raises(ValueError, match=r"`learning_rate` must hold a rate for each of `maxiter`.*5, 6"):
        minimize(bowl, np.zeros(2), (3.0,), np.ones(5), 6)


@njit
def value_alone(x, center):
    return (x * center).sum()


@njit
def gradient_of_numbers(x, center):
    return 1.0, 2.0


@njit
def of_two(x, center, width):
    return 1.0, x


WRONG_TYPES = {
    "a Python function": ((lambda x: x, np.zeros(2)), {}, "fun|pyobject|non-precise|determine"),
    "no gradient": ((value_alone, np.zeros(2), (1.0,)), {}, r"`fun` returns float64; expected \(value, gradient\)"),
    "numbers": ((gradient_of_numbers, np.zeros(2), (1.0,)), {}, r"`fun` returns .*; expected \(value, gradient\)"),
    "a pair as value": ((bowl, np.zeros(2), (1.0,)), {"jac": bowl_gradient}, "`fun` returns .* as its value; expected a number"),
    "a number as gradient": ((value_alone, np.zeros(2), (1.0,)), {"jac": value_alone}, "`jac` returns float64; expected a gradient"),
    "no array": ((bowl, np.float64(1.0), (1.0,)), {}, "`x0` is .*; expected an array of float32 or float64 with at least one"),
    "complex": ((bowl, np.zeros(2, complex), (1.0,)), {}, "`x0` is array.complex128"),
    "a matrix of rates": ((bowl, np.zeros(2), (1.0,), np.ones((2, 2))), {}, "`learning_rate` is .*; expected 'auto', a number"),
    "a function that fills, or not": ((of_two, np.zeros(2), (1.0,)), {}, "`fun` returns .*; expected its value alone, since it takes 3"),
    "text as number": ((bowl, np.zeros(2), (1.0,)), {"gtol": "small"}, "`gtol` is .*; expected a number"),
    "text as bound": ((bowl, np.zeros(2), (1.0,)), {"lower": "low"}, "`lower` is .*; expected a number or an array like `x0`"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types(case):
    args, options, message = WRONG_TYPES[case]
    with pytest.raises((TypingError, TypeError), match=message):
        minimize(*args, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "best"}, "`learning_rate` is 'best'; expected 'auto', a number"),
        ({"amsgrad": 1}, "`amsgrad` must be True or False"),
        ({"epsilon_mode": "torch"}, "`epsilon_mode` must be one of 'hat', 'corrected'"),
    ],
)
def test_python_checks_what_is_compiled(options, message):
    with pytest.raises(ValueError, match=message):
        minimize(bowl, np.zeros(2), (3.0,), **options)


def test_flags_that_are_variables():
    function = njit(lambda x, flag: minimize(bowl, x, (3.0,), 0.1, amsgrad=flag))
    with pytest.raises(
        TypingError, match=r"`amsgrad` is a variable .*; expected True or False, written out in the call"
    ):
        function(np.ones(3), True)
