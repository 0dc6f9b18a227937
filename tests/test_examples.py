"""The examples on real input run, and draw what they say."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest

from adamw_numba import minimize, multistart, plot

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"


# Example -> words of what it prints; it fails by itself where its numbers are not good
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("co2", ["2225 weeks", "called directly and through SciPy, the same numbers: True", "growth in 1980: 1.42"]),
        ("inverse_problem", ["relative error, best point", "relative error, moving average"]),
    ],
)
def test_example(name, words, tmp_path):
    script = EXAMPLES / f"{name}.py"
    done = subprocess.run([sys.executable, "-W", "error", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout
    drawn, shown = (matplotlib.image.imread(folder / f"{name}.png") for folder in (tmp_path, DOCS))
    assert drawn.shape == shown.shape
    assert drawn[..., :3].std() > 0.05


@pytest.fixture(autouse=True)
def _no_window():
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")


def fall(x):
    return float((x**2).sum()) + 0.1, 2 * x


def test_convergence_shows_the_history():
    result = minimize(fall, np.ones(2), jac=True, learning_rate=0.1, maxiter=50)
    ax = plot.convergence(result)
    lines = {line.get_label(): line for axes in ax.figure.axes for line in axes.get_lines()}
    for label, key in (("loss", "fun"), ("gradient norm", "gradient_norm"), ("learning rate", "learning_rate")):
        np.testing.assert_array_equal(
            lines[label].get_xydata(), np.transpose([result.history["nit"], result.history[key]])
        )
    assert (ax.get_xlabel(), ax.get_yscale()) == ("iteration", "log")
    assert {text.get_text() for text in ax.figure.legends[0].get_texts()} == set(lines)


def test_convergence_of_several_and_of_losses_that_are_not_positive():
    results = {rate: minimize(fall, np.ones(2), jac=True, learning_rate=rate, maxiter=20) for rate in (0.1, 0.01)}
    figure, ax = matplotlib.pyplot.subplots()
    assert plot.convergence(results, ax=ax) is ax
    assert [line.get_label() for line in ax.get_lines()] == ["0.1", "0.01"]
    assert len(plot.convergence(list(results.values())).get_lines()) == 2
    negative = minimize(lambda x: (fall(x)[0] - 3, 2 * x), np.ones(2), jac=True, maxiter=20)
    ax = plot.convergence(negative)
    (line,) = ax.get_lines()[:1]
    expected = negative.history["fun"] - negative.history["fun"].min()
    np.testing.assert_array_equal(line.get_ydata(), np.where(expected > 0, expected, np.nan))
    assert ax.get_ylabel() == f"loss above {negative.fun:.6g}, gradient norm"
    figure.canvas.draw()


def test_waterfall_is_sorted():
    best = multistart(fall, np.eye(4), jac=True, learning_rate=0.1, maxiter=60)
    ax = plot.waterfall(best)
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), sorted(r.fun for r in best.results))
    assert ax.get_xlabel()
    assert ax.get_ylabel() == "final loss"


def test_what_cannot_be_drawn():
    result = minimize(fall, np.ones(2), jac=True, maxiter=3, history=False)
    with pytest.raises(ValueError, match="history"):
        plot.convergence(result)
    with pytest.raises(ValueError, match="empty"):
        plot.convergence([])
    with pytest.raises(ValueError, match="results"):
        plot.waterfall(result)
