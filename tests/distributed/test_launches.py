"""Real processes, under Open MPI and torch's gloo: the bits of one process, and an error that reaches all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import launched

from adamw_numba import AdamW, minimize

SCRIPT = Path(launched.__file__)
SECONDS = 300  # a hang is a failure
ENVIRONMENT = os.environ | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]),
}


def under_mpi(size, folder):
    return mpiexec(size, [SCRIPT, "mpi", folder])


def mpiexec(size, arguments):
    """What a script of Python prints on so many ranks."""
    pytest.importorskip("mpi4py")
    starter = Path(sys.executable).parent / "mpiexec"
    if not starter.exists():
        pytest.skip("no mpiexec beside this Python")
    command = [starter, "-n", str(size), "--bind-to", "none", sys.executable, "-m", "mpi4py", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True)
    return done.stdout


def under_gloo(size, folder):
    pytest.importorskip("torch")
    commands = [[sys.executable, SCRIPT, "torch", folder, str(rank), str(size)] for rank in range(size)]
    children = [subprocess.Popen(c, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for c in commands]
    try:
        return "".join(child.communicate(timeout=SECONDS)[0] for child in children)
    finally:
        for child in children:
            child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("launch", [under_mpi, under_gloo])
def test_as_one_process(launch, size, tmp_path):
    whole = launched.variables()
    optimizer = AdamW(0.1, global_clipnorm=0.5)
    optimizer.build(whole)
    for step in range(launched.STEPS):
        optimizer.apply(launched.gradients(step))
    found = [json.loads(line) for line in launch(size, tmp_path).splitlines() if line.startswith("{")]
    assert sorted(each["rank"] for each in found) == list(range(size))
    for each in found:
        for name, values in each["values"].items():
            np.testing.assert_array_equal(np.array(values, np.float32), whole[name])
        at_fault = each["rank"] == size - 1
        assert each["told"].startswith("TypeError: " if at_fault else f"RankError: rank {size - 1}: TypeError: ")
        told = {"error": "ZeroDivisionError: division by zero", "interrupt": "KeyboardInterrupt: "}
        for key, text in told.items():
            assert each[key] == (text if at_fault else f"RankError: rank {size - 1}: {text} (all ranks have stopped)")
    check_sharded(found, size, tmp_path)
    x0, fun = launched.chain(launched.Alone())
    expected = minimize(fun, x0, jac=True, maxiter=launched.ITERATIONS, compiled=False)
    found.sort(key=lambda each: each["rank"])
    for when in ("minimized", "again"):  # after errors on one rank, too
        x = np.concatenate([each[when]["x"] for each in found])
        np.testing.assert_array_equal(x.astype(np.float32), expected.x)
        for each in found:
            for key in ("fun", "nit", "message"):
                assert each[when][key] == expected[key]


@pytest.mark.slow
def test_the_example(tmp_path):
    """The same estimate on any number of ranks."""
    script, found = Path(__file__).parents[2] / "examples" / "mpi_inverse_problem.py", set()
    for size in (1, 2, 4):
        output = mpiexec(size, [script, tmp_path])
        assert "relative error 0.06" in output
        found.add(output.partition("checksum of the estimate ")[2].split()[0])
        assert (tmp_path / "mpi_inverse_problem.png").stat().st_size > 10_000
    assert len(found) == 1


def check_sharded(found, size, folder):
    """The same bits as in one process, which can also load what the ranks have saved."""
    whole = launched.variables()
    optimizer = AdamW(0.1, global_clipnorm=0.5)
    optimizer.build(whole)
    for step in range(2 * launched.STEPS):
        if step == launched.STEPS:
            loaded = AdamW.load(folder / "state", {name: np.zeros_like(array) for name, array in whole.items()})
            for name, array in optimizer.state.items():
                np.testing.assert_array_equal(loaded.state[name], array)
        optimizer.apply(launched.mean_gradients(step, size))
    for each in found:
        for name, values in each["sharded"].items():
            np.testing.assert_array_equal(np.array(values, np.float32), whole[name])
