"""A minimization that is stopped by a signal goes on in another process as if it had never stopped, bit for bit."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.resumed import CASES

from adamw_numba import Checkpoints, minimize

SCRIPT = Path(__file__).parents[1] / "helpers" / "resumed.py"


def run(*arguments):
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_goes_on_bit_for_bit(case, tmp_path):
    checkpoint = tmp_path / ("folder" if case == "numbered" else "run.npz")
    stop_at = random.Random(case).randrange(1, 120)
    run(case, checkpoint, stop_at, tmp_path / "stopped.npz")
    with np.load(tmp_path / "stopped.npz") as stopped:
        assert (int(stopped["nit"]), int(stopped["status"])) == (stop_at, 130)
    run(case, checkpoint, -1, tmp_path / "resumed.npz")
    with np.load(tmp_path / "resumed.npz") as resumed, np.load(tmp_path / "resumed.npz.whole.npz") as whole:
        assert set(resumed) == set(whole)
        for name in whole:
            np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)


SLOW = """
import sys, time, numpy as np
from adamw_numba import minimize
calls = 0
def fun(x):
    global calls
    calls += 1
    if calls == 5:  # a minimization is under way, and its handler of signals in place
        print("begun", flush=True)
    time.sleep(0.01)
    return (x**2).sum(), 2 * x
result = minimize(fun, np.ones(2), jac=True, learning_rate=1e-4, checkpoint=sys.argv[1])
print(result.status, result.nit, result.message)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside(number, tmp_path):
    path = tmp_path / "run.npz"
    child = subprocess.Popen([sys.executable, "-c", SLOW, path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    child.send_signal(number)
    status, nit, *message = child.communicate()[0].split()
    assert (status, child.returncode) == ("130", 0)
    assert message[-1] == "saved."
    options = {"learning_rate": 1e-4, "checkpoint": path, "maxiter": int(nit)}
    result = minimize(lambda x: ((x**2).sum(), 2 * x), np.ones(2), jac=True, **options)
    assert result.nit == int(nit)


def test_an_objective_that_raises_leaves_a_checkpoint(tmp_path):
    path = tmp_path / "run.npz"
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) == 9:
            raise ZeroDivisionError("ninth call")
        return ((x - 1) ** 2).sum(), 2 * (x - 1)

    options = {"jac": True, "learning_rate": 0.1, "maxiter": 30}
    with pytest.raises(ZeroDivisionError) as caught:
        minimize(fun, np.zeros(2), checkpoint=path, **options)
    assert str(path) in "\n".join(caught.value.__notes__)
    resumed = minimize(fun, np.zeros(2), checkpoint=path, **options)
    whole = minimize(fun, np.zeros(2), **options)
    for key in ("x", "fun", "nit", "nfev"):
        np.testing.assert_array_equal(resumed[key], whole[key])
    for key in ("step_norm", "learning_rate"):
        np.testing.assert_array_equal(resumed.history[key], whole.history[key])


def never(x):
    pytest.fail("called")


# What a file does not fit: keywords of the second call, words
OTHERS = {
    "shape": ({"x0": np.zeros(5)}, "shape"),
    "x0": ({"x0": np.ones(3)}, "`x0`"),
    "bounds": ({"bounds": [(-1, 2)] * 3}, "`bounds`"),
}


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_a_run_of_another_problem_is_refused_and_kept(case, numbered, tmp_path):
    keywords, words = OTHERS[case]
    place = Checkpoints(tmp_path / "folder", every=10) if numbered else tmp_path / "run.npz"
    good = {"x0": np.zeros(3), "jac": True, "checkpoint": place, "maxiter": 5}
    minimize(lambda x: (((x - 1) ** 2).sum(), 2 * (x - 1)), **good)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        minimize(never, **good | keywords)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_an_unrelated_file_is_kept(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, a=np.ones(3))
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"data\.npz"):
        minimize(never, np.zeros(3), jac=True, checkpoint=path)
    assert path.read_bytes() == before


def test_a_resumed_run_takes_the_learning_rate_of_the_call(tmp_path):
    def fun(x):
        return ((x - 1) ** 2).sum(), 2 * (x - 1)

    options = {"jac": True, "checkpoint": tmp_path / "run.npz"}
    minimize(fun, np.zeros(2), maxiter=5, learning_rate=0.01, **options)
    rates = minimize(fun, np.zeros(2), maxiter=9, learning_rate=0.02, **options).history["learning_rate"][1:]
    np.testing.assert_array_equal(rates, [0.01] * 5 + [0.02] * 4)


def test_a_finished_run_is_read_and_can_be_prolonged(tmp_path):
    def fun(x):
        return ((x - 1) ** 2).sum(), 2 * (x - 1)

    with Checkpoints(tmp_path, every=10, background=True) as checkpoints:
        options = {"jac": True, "learning_rate": 0.01, "checkpoint": checkpoints}
        first = minimize(fun, np.zeros(2), maxiter=20, **options)
        again = minimize(lambda x: pytest.fail("called"), np.zeros(2), maxiter=20, **options)
        longer = minimize(fun, np.zeros(2), maxiter=50, **options)
    np.testing.assert_array_equal(first.x, again.x)
    assert (again.nfev, again.status) == (21, 1)
    np.testing.assert_array_equal(longer.x, minimize(fun, np.zeros(2), jac=True, learning_rate=0.01, maxiter=50).x)
    with pytest.raises(ValueError, match="shape"):
        minimize(fun, np.zeros(3), maxiter=20, **options)
