"""A minimization that is stopped by a signal goes on in another process as if it had never stopped, bit for bit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from resumed import CASES

from adamw_numba import Checkpoints, minimize

SCRIPT = Path(__file__).parent / "resumed.py"


def run(*arguments):
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
def fun(x):
    time.sleep(0.01)
    return (x**2).sum(), 2 * x
print("begun", flush=True)
result = minimize(fun, np.ones(2), jac=True, learning_rate=1e-4, checkpoint=sys.argv[1])
print(result.status, result.nit, result.message)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside(number, tmp_path):
    path = tmp_path / "run.npz"
    child = subprocess.Popen([sys.executable, "-c", SLOW, path], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    time.sleep(1.5)
    child.send_signal(number)
    status, nit, *message = child.communicate()[0].split()
    assert (status, child.returncode) == ("130", 0)
    assert message[-1] == "saved."
    result = minimize(lambda x: ((x**2).sum(), 2 * x), np.ones(2), jac=True, checkpoint=path, maxiter=int(nit))
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
