"""`learning_rate="auto"` and `x_scale`: lengths in units of x that nobody has to choose."""

import math

import numba
import numpy as np
import pytest
from helpers.libraries import jnp, torch
from helpers.results import assert_equal
from scipy.optimize import rosen, rosen_der

from adamw_numba import AdamW, minimize, multistart, schedules
from adamw_numba.minimizer.automatic import Stages, schedule_for

CENTER = np.array([20.0, -3.0])
OPTIONS = {"jac": True, "maxiter": 400}


def bowl(x):
    return ((x - CENTER) ** 2).sum(), 2 * (x - CENTER)


def logarithms(x):
    """Not a number for a negative x: the minimum is where x is 5."""
    with np.errstate(all="ignore"):
        return (x - 5 * np.log(x)).sum(), 1 - 5 / x


# The rates


@pytest.mark.parametrize("length", [3001, 5000, 10_000, 20_000, 1_000_000, math.inf])
@pytest.mark.parametrize("start", [0, 700])
def test_many_iterations_are_divided_into_stages(length, start):
    stages = schedule_for(length, start, False)
    first = int(stages.first_stage)
    assert first <= 1112
    ends = [start + first * 3**k for k in range(12)]
    if math.isfinite(length):
        assert any(start + length <= end <= start + length + 3 ** (k + 1) for k, end in enumerate(ends))
    for begin, end in zip([start, *ends], ends, strict=False):
        assert stages(begin) == pytest.approx(0.3)
        assert stages.left(begin) == end - begin
        assert stages.begins_at(begin) == (begin > start)
        assert not stages.begins_at(begin + 1)
        assert 0 < stages(end - 1) < 1e-8
        middle = (begin + end) // 2
        passed = (middle - begin) / (end - begin)
        assert stages(middle) == pytest.approx(0.3 * 10 ** -(3 * passed + 6 * passed**4))


@pytest.mark.parametrize(("length", "noisy", "first"), [(1, False, 0.3), (300, False, 0.3), (300, True, 0.03)])
def test_few_iterations_and_noise_have_one_decay(length, noisy, first):
    rates = schedule_for(length, 50, noisy)
    for passed in (0, 1, length // 2, length, 2 * length):
        assert rates(50 + passed) == pytest.approx(first * (1 - min(passed / length, 1)) ** 2)


def test_endless_noise_has_a_slower_decay():
    endless = schedule_for(math.inf, 0, True)
    assert endless(0) == 0.03
    assert 0 < endless(10**6) < 0.03 / 100


def test_rates_in_another_namespace():
    pytest.importorskip("torch")
    for rates in (Stages(10), Stages(10, 3), schedule_for(50, 2, False)):
        for step in (3, 8, 12, 14, 32, 34, 103):
            assert float(rates(torch.asarray(step))) == pytest.approx(rates(step), rel=1e-4, abs=1e-9)


def test_adamw_has_no_automatic_rate():
    with pytest.raises((TypeError, ValueError), match="learning_rate"):
        AdamW("auto")


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"`learning_rate` is 'automatic'; expected 'auto'"):
        minimize(bowl, [0.0, 0.0], jac=True, learning_rate="automatic")


# What they do

STARTS = {
    "far away": (bowl, [0.0, 0.0], CENTER, {}),
    "bounds": (bowl, [0.0, 0.0], [7.5, 0.0], {"bounds": [(-1, 7.5), (0, 9)]}),
    "narrow bounds": (bowl, [1.0, 0.0], [1.000001, -1e-9], {"bounds": [(1, 1.000001), (-1e-9, 1e-9)]}),
    "equal bounds": (bowl, [1.0, 0.0], [1.0, -3.0], {"bounds": [(1, 1), (None, None)]}),
    "not a number": (logarithms, [0.01, 30.0], [5.0, 5.0], {"maxiter": 2000}),
    "many iterations": (bowl, [0.0, 0.0], CENTER, {"maxiter": 5000, "gtol": 1e-9}),
    "not a number in stages": (logarithms, [0.01, 30.0], [5.0, 5.0], {"maxiter": 5000}),
    "a large unknown": (
        lambda x: ((x[0] / 1e6 - 3) ** 2 + x[1] ** 2, np.array([2 * (x[0] / 1e6 - 3) / 1e6, 2 * x[1]])),
        [1e5, 1.0],
        [3e6, 0.0],
        {"maxiter": 10_000, "gtol": 1e-12},
    ),
    "no best point": (bowl, [0.0, 0.0], CENTER, {"return_best": False}),
    "float32": (bowl, np.zeros(2, np.float32), CENTER, {}),
    "averages": (bowl, [0.0, 0.0], CENTER, {"use_ema": True, "amsgrad": True, "maxiter": 2000}),
    "endless": (bowl, [0.0, 0.0], CENTER, {"maxiter": None}),
    "few evaluations": (bowl, [0.0, 0.0], CENTER, {"maxiter": None, "maxfev": 500}),
}


@pytest.mark.parametrize("case", STARTS)
def test_finds_the_minimum_in_both_loops(case):
    fun, x0, minimum, options = STARTS[case]
    result = minimize(fun, x0, **OPTIONS | options)
    np.testing.assert_allclose(result.x, minimum, rtol=1e-3, atol=1e-3)
    assert result.status in (0, 1)
    assert_equal(result, minimize(fun, x0, **OPTIONS | options, compiled=False))
    assert result.fun == fun(result.x)[0]  # x is the very point that was evaluated


def test_compiled_objectives():
    a, b = CENTER

    @numba.njit
    def fun(x):
        gradient = np.array([2 * (x[0] - a), 4 * (x[1] - b) ** 3])
        return (x[0] - a) ** 2 + (x[1] - b) ** 4, gradient

    for options in ({}, {"bounds": [(-1, 30.0), (-0.3, 0.7)]}, {"x_scale": [10.0, 0.3]}):
        found = minimize(fun, [0.0, 0.1], **OPTIONS | options)
        assert_equal(found, minimize(fun, [0.0, 0.1], **OPTIONS | options, compiled=False))
        best = multistart(fun, [[0.0, 0.1], [5.0, -0.2]], **OPTIONS | options)
        one = min(best.results, key=lambda result: abs(result.history["fun"][0] - found.history["fun"][0]))
        assert_equal(one, found)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_other_libraries(library):
    pytest.importorskip(library)
    xp = torch if library == "torch" else jnp
    center = xp.asarray([20.0, -3.0])
    x0 = {"a": xp.zeros(2), "b": xp.ones(())}
    result = minimize(
        lambda x: ((x["a"] - center) ** 2).sum() + (x["b"] - 300) ** 2 / 100, x0, jac=library, maxiter=5000, gtol=1e-3
    )
    np.testing.assert_allclose(np.asarray(result.x["a"]), CENTER, rtol=1e-2)
    assert float(result.x["b"]) == pytest.approx(300, rel=1e-2)
    assert type(result.x["b"]) is type(x0["b"])


def test_batches_keep_a_gentle_rate():
    rng = np.random.default_rng(0)
    data = rng.normal(3.0, 1.0, size=(50, 8))

    def fun(x, batch):
        return ((x - batch) ** 2).mean(), 2 * (x - batch).mean(keepdims=True)

    result = minimize(fun, [0.0], jac=True, batches=data, maxiter=999)
    assert abs(result.x[0] - data.mean()) < 0.05
    np.testing.assert_array_equal(result.history["learning_rate"][1], 0.03)


def test_a_run_that_is_resumed_or_goes_on(tmp_path):
    path = tmp_path / "run.npz"
    whole = minimize(bowl, [0.0, 0.0], jac=True, maxiter=4000, gtol=None)
    calls = iter(range(1, 10_000))

    def fails(x):
        if next(calls) == 777:
            raise ZeroDivisionError
        return bowl(x)

    with pytest.raises(ZeroDivisionError):
        minimize(fails, [0.0, 0.0], jac=True, maxiter=4000, gtol=None, checkpoint=path)
    assert_equal(minimize(bowl, [0.0, 0.0], jac=True, maxiter=4000, gtol=None, checkpoint=path), whole)
    further = minimize(bowl, whole, jac=True, maxiter=100, gtol=None)  # with a plan of its own
    assert further.fun <= whole.fun + 1e-9
    assert further.state["iteration"] == whole.state["iteration"] + 100
    assert further.history["learning_rate"][1] == 0.3


def test_never_a_number():
    result = minimize(lambda x: (np.nan if x[0] != 1 else 1.0, np.ones(1)), [1.0], jac=True)
    assert not result.success
    assert (result.x, result.fun) == (1, 1)


# Units


@pytest.mark.parametrize("rate", ["auto", 0.05, schedules.CosineDecay(0.3, 100)])
@pytest.mark.parametrize("compiled", [True, False])
def test_units_are_another_formulation_of_the_problem(rate, compiled):
    unit = np.array([8.0, 0.5])  # powers of two: no rounding
    options = {"jac": True, "maxiter": 150, "compiled": compiled, "learning_rate": rate, "gtol": None}
    result = minimize(bowl, [4.0, 1.0], x_scale=unit, bounds=[(0, 16), (-2, 2)], **options)
    inner = minimize(
        lambda z: (bowl(z * unit)[0], bowl(z * unit)[1] * unit), np.array([4.0, 1.0]) / unit, x_scale=1.0,
        bounds=[(0, 2), (-4, 4)], **options,
    )  # fmt: skip
    np.testing.assert_array_equal(result.x, inner.x * unit)
    np.testing.assert_array_equal(result.history["fun"], inner.history["fun"])
    np.testing.assert_array_equal(result.jac, bowl(result.x)[1])
    assert result.history["step_norm"][1] == np.abs(minimize(
        bowl, [4.0, 1.0], x_scale=unit, bounds=[(0, 16), (-2, 2)], **options | {"maxiter": 1}).x_last - [4.0, 1.0]).max()  # fmt: skip


def test_first_step_is_the_rate_in_units():
    unit = np.array([3.0, 0.7])
    result = minimize(bowl, [0.0, 0.0], jac=True, learning_rate=0.1, x_scale=unit, maxiter=1, return_best=False)
    np.testing.assert_allclose(np.abs(result.x), 0.1 * unit, rtol=1e-5)


def test_the_widths_of_bounds():
    bounds = [(0, 30), (-4, 1)]
    one = minimize(bowl, [1.0, 0.0], x_scale="bounds", bounds=bounds, **OPTIONS)
    assert_equal(one, minimize(bowl, [1.0, 0.0], x_scale=[30.0, 5.0], bounds=bounds, **OPTIONS))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_bounds_hold_exactly(dtype, compiled):
    lower, upper = np.array([0.1, -0.7], dtype), np.array([0.3, -0.1], dtype)
    seen = []

    def fun(x):
        seen.append(x)
        return bowl(x)

    bounds = list(zip(lower.tolist(), upper.tolist(), strict=True))
    result = minimize(
        fun, np.array([0.2, -0.3], dtype), x_scale=[0.37, 0.113], bounds=bounds, compiled=compiled, **OPTIONS
    )
    assert all((lower <= x).all() and (x <= upper).all() for x in seen)
    np.testing.assert_array_equal(result.x, [upper[0], lower[1]])
    assert result.success


def test_units_of_nested_arrays():
    x0 = {"a": np.zeros(2), "b": np.zeros((2, 1))}

    def fun(x):
        a, b = x["a"] - CENTER, x["b"] - 7
        return (a**2).sum() + (b**2).sum(), {"a": 2 * a, "b": 2 * b}

    options = {"jac": True, "maxiter": 1, "learning_rate": 0.1, "return_best": False}
    result = minimize(fun, x0, x_scale={"b": np.array(3.0), "a": np.array([1.0, 2.0])}, **options)
    np.testing.assert_allclose(np.abs(result.x["a"]), [0.1, 0.2], rtol=1e-5)
    np.testing.assert_allclose(result.x["b"], 0.3, rtol=1e-5)


WRONG_UNITS = {
    "zero": (0.0, "finite numbers > 0"),
    "negative": ([1.0, -1.0], "finite numbers > 0"),
    "NaN": (np.nan, "finite numbers > 0"),
    "another shape": ([1.0, 2.0, 3.0], "shape"),
    "a word": ("jac", "'bounds'"),
    "text inside": (["a", "b"], "expected a number"),
    "bounds that do not exist": ("bounds", "`bounds` is None"),
}


@pytest.mark.parametrize("case", WRONG_UNITS)
def test_wrong_units(case):
    x_scale, words = WRONG_UNITS[case]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        minimize(lambda x: pytest.fail("called"), [1.0, 2.0], x_scale=x_scale)
    assert "x_scale" in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("x_scale", [1e-50, 1e50])
def test_units_beyond_the_dtype_of_x(x_scale):
    with pytest.raises(ValueError, match="within float32"):
        minimize(lambda x: pytest.fail("called"), np.ones(2, np.float32), x_scale=x_scale)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("nested", [True, False])
def test_units_in_other_libraries(library, nested):
    pytest.importorskip(library)
    xp = torch if library == "torch" else jnp
    x0 = xp.asarray([1.0, 2.0], dtype=xp.float32)
    keywords = {"x_scale": [4.0, 0.5], "jac": library, "learning_rate": 0.1, "maxiter": 1, "return_best": False}
    if nested:
        keywords |= {"x0": {"a": x0}, "x_scale": {"a": np.array([4.0, 0.5])}, "fun": lambda x: (x["a"] ** 2).sum()}
        found = minimize(**keywords).x["a"]
    else:
        found = minimize(lambda x: (x**2).sum(), x0, **keywords).x
    np.testing.assert_allclose(np.asarray(found), [1 - 0.4, 2 - 0.05], rtol=1e-5)


@pytest.mark.parametrize("iteration", ["many", None, [1, 2], 0.5])
def test_a_state_with_an_odd_iteration(iteration):
    state = minimize(bowl, [0.0, 0.0], jac=True, maxiter=5).state | {"iteration": iteration}
    with pytest.raises((TypeError, ValueError), match="iteration"):
        minimize(lambda x: pytest.fail("called"), [0.0, 0.0], jac=True, state=state)


def test_infinite_bounds_have_no_width():
    with pytest.raises(ValueError, match="not all finite"):
        minimize(lambda x: pytest.fail("called"), [1.0], x_scale="bounds", bounds=[(0, None)])


# Where the iterations did not suffice


def moving(x):
    return ((x - 20) ** 2).sum(), 2 * (x - 20)


ENDS = {
    "a small rate": ({"learning_rate": 0.001, "maxiter": 2000}, "raise learning_rate or maxiter"),
    "a small rate, compiled": (
        {"learning_rate": 0.001, "maxiter": 2000, "maxfev": 100},
        "raise learning_rate or maxiter",
    ),
    "few iterations": ({"maxiter": 20}, "raise maxiter, or x_scale"),
    "back and forth": ({"learning_rate": 3.0, "maxiter": 50}, None),
    "a large rate": ({"learning_rate": schedules.ExponentialDecay(3.0, 30, 0.9), "maxiter": 300, "gtol": 0}, None),
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", ENDS)
def test_a_message_where_x_was_still_moving(case, library):
    options, words = ENDS[case]
    if library == "torch":
        pytest.importorskip("torch")
    x0 = np.zeros(3) if library == "numpy" else torch.zeros(3, dtype=torch.float64)
    message = minimize(moving, x0, jac=True, **options).message
    assert ("still" in message) == (words is not None)
    assert words is None or words in message


def test_noise_is_not_taken_for_movement():
    rng = np.random.default_rng(0)
    result = minimize(lambda x: (0.0, rng.normal(size=x.shape)), np.zeros(100), jac=True, maxiter=50, learning_rate=0.1)
    assert "moving" not in result.message


def test_units_that_are_given_have_stages_as_well():
    def fun(x):
        return rosen(x), rosen_der(x)

    alone, scaled = (minimize(fun, [-1.2, 1.0], jac=True, x_scale=scale) for scale in (None, [1, 1]))
    assert alone.success
    assert scaled.success
    assert scaled.nit < 2 * alone.nit


def test_units_of_a_nesting_may_be_numbers():
    def fun(x):
        return ((x["a"] - 3) ** 2).sum() + (x["b"][0] ** 2).sum(), {"a": 2 * (x["a"] - 3), "b": [2 * x["b"][0]]}

    x0 = {"a": np.zeros(2), "b": [np.ones(3)]}
    given = {"a": np.full(2, 2.0), "b": [np.full(3, 0.5)]}
    results = [
        minimize(fun, x0, jac=True, learning_rate=0.1, maxiter=20, x_scale=s) for s in (given, {"a": 2, "b": [0.5]})
    ]
    np.testing.assert_array_equal(results[0].x["a"], results[1].x["a"])
    np.testing.assert_array_equal(results[0].x["b"][0], results[1].x["b"][0])
