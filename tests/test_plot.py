"""Plots: what is drawn of runs of every kind, without a warning."""

import io
import math

import numpy as np
import pytest
import scipy.optimize

from adamw_numba import minimize, multistart, plot

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def closed():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def bowl(x, least=0.0):
    return ((x - 1) ** 2).sum() + least, 2 * (x - 1)


def run(fun=bowl, x0=(0.0, 3.0), **options):
    return minimize(fun, x0, jac=True, **{"learning_rate": 0.02, "maxiter": 100} | options)


def noisy_run():
    data = np.random.default_rng(0).normal(3, 1, (50, 8))
    return minimize(
        lambda x, b: (((x - b) ** 2).mean(), 2 * (x - b).mean(keepdims=True)),
        [0.0],
        jac=True,
        batches=data,
        maxiter=300,
    )


def draw(axes):
    """Draw it, as a file would."""
    axes.figure.savefig(io.BytesIO(), format="png")
    return axes


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


RUNS = {
    "one evaluation": (lambda: run(maxiter=0), "log"),
    "one iteration": (lambda: run(maxiter=1), "log"),
    "zeros": (lambda: run(lambda x: (0.0, 0 * x), gtol=None, maxiter=30), "linear"),
    "a constant": (lambda: run(lambda x: (-2.0, 0 * x), gtol=None, maxiter=30), "linear"),
    "never finite": (lambda: run(lambda x: (math.nan, x)), "log"),
    "to infinity": (lambda: run(lambda x: (bowl(x)[0] if x[0] < 0.5 else math.inf, 2 * (x - 1))), "log"),
    "negative": (lambda: run(lambda x: bowl(x, -5.0)), "log"),
    "polished": (lambda: run(polish=True), "log"),
    "noisy": (noisy_run, "log"),
}


@pytest.mark.parametrize("case", RUNS)
def test_any_run_is_drawn_without_a_warning(case):
    make, scale = RUNS[case]
    result = make()
    axes = draw(plot.convergence(result))
    assert axes.get_yscale() == scale
    assert axes.get_title() == result.message[:120]
    drawn = [line for line in axes.get_lines() if np.isfinite(line.get_ydata()).sum() == 1]
    assert all(line.get_marker() not in ("None", None, "") for line in drawn)  # a point alone would not be seen


def test_a_run_that_ended_in_nan_is_marked():
    result = run(lambda x: (bowl(x)[0] if x[0] < 0.5 else math.nan, 2 * (x - 1)))
    (mark,) = [line for line in draw(plot.convergence(result)).get_lines() if line.get_marker() == "X"]
    last = np.flatnonzero(np.isfinite(result.history["fun"]))[-1]
    assert mark.get_xdata() == result.history["nit"][last]
    assert mark.get_ydata() == result.history["fun"][last]


def test_a_noisy_run_has_a_running_median():
    result = noisy_run()
    lines = lines_of(draw(plot.convergence(result)))
    median = lines["loss, running median"].get_ydata()
    half = 301 // 40
    loss = result.history["fun"]
    np.testing.assert_allclose(median[50], np.median(loss[50 - half : 51 + half]))
    assert lines["_each"].get_alpha() < 0.5
    assert "loss, running median" not in lines_of(plot.convergence(run()))


def test_runs_with_different_minima_stay_apart():
    runs = {str(least): run(lambda x, least=least: bowl(x, least), maxiter=300) for least in (-5.0, 2.0, 0.0)}
    axes = draw(plot.convergence(runs))
    for label, result in runs.items():
        (line,) = [line for name, line in lines_of(axes).items() if name.startswith(f"{label} (lowest")]
        above = result.history["fun"] - result.history["fun"].min()
        np.testing.assert_allclose(line.get_ydata()[:-5], above[:-5])
        assert np.nanmin(line.get_ydata()) < 1e-3  # the fall is seen to its end
    positive = draw(plot.convergence([run(lambda x: bowl(x, 1.0)), run(lambda x: bowl(x, 3.0))]))
    np.testing.assert_array_equal(lines_of(positive)["run 2"].get_ydata().min() >= 3, True)


@pytest.mark.parametrize("own", [True, False])
def test_the_legend_covers_nothing(own):
    from matplotlib import pyplot

    ax = None if own else pyplot.subplots()[1]
    for axes in (plot.convergence(run(), ax=ax), plot.waterfall([run(), run()], ax=ax)):
        draw(axes)
        legend = axes.figure.legends[0] if own else axes.get_legend()
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_waterfalls():
    best = multistart(bowl, np.eye(3), jac=True, maxiter=20)
    shown = draw(plot.waterfall(best)).get_lines()[0].get_ydata()
    np.testing.assert_array_equal(shown, [result.fun for result in best.results])
    np.testing.assert_array_equal(draw(plot.waterfall(best.results)).get_lines()[0].get_ydata(), shown)
    theirs = [scipy.optimize.minimize(bowl, x, jac=True) for x in ([3.0, 4.0], [1.0, 1.0])]
    values = draw(plot.waterfall(theirs)).get_lines()[0].get_ydata()
    assert list(values) == sorted(result.fun for result in theirs)
    lost = draw(plot.waterfall([run(), run(lambda x: (math.nan, x))]))
    assert len(lost.get_lines()[0].get_ydata()) == 1
    assert "not finite: 1" in lines_of(lost)


WRONG = {
    "SciPy's result": (plot.convergence, lambda: scipy.optimize.minimize(bowl, [0.0], jac=True), "history"),
    "no history": (plot.convergence, lambda: run(history=False), "history"),
    "a number": (plot.convergence, lambda: 3, "results"),
    "nothing": (plot.convergence, list, "empty"),
    "a list of numbers": (plot.convergence, lambda: [1, 2], "history"),
    "one run": (plot.waterfall, run, "multistart"),
    "an empty list": (plot.waterfall, list, "multistart"),
    "no results": (plot.waterfall, lambda: {"results": []}, "multistart"),
    "text": (plot.waterfall, lambda: "result", "multistart"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case):
    function, make, words = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        function(make())
    assert "expected" in str(raised.value)
    assert len(str(raised.value)) < 500
