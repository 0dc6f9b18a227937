"""With NUMBA_DISABLE_JIT=1, which people set to debug their own code, everything works, by whole-array functions."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from helpers import libraries

from adamw_numba import AdamW, LossScaleOptimizer, minimize

OPTIONS = {
    "plain": {},
    "clip": {"global_clipnorm": 0.5, "nonfinite": "skip"},
    "everything": {
        "amsgrad": True,
        "use_ema": True,
        "ema_overwrite_frequency": 3,
        "clipnorm": 0.5,
        "gradient_accumulation_steps": 2,
        "loss_scale_factor": 4.0,
    },
}
KINDS = {
    "float64": (libraries.numpy, "float64"),
    "strided": (libraries.strided, "float64"),
    "complex128": (libraries.numpy, "complex128"),
    "parameter": (libraries.parameter, "float64"),
    "tensor of float32": (libraries.transposed, "float32"),
    "float16": (libraries.numpy, "float16"),
    "bfloat16": (libraries.numpy, "bfloat16"),
    "tensor of bfloat16": (libraries.to_torch, "bfloat16"),
}
TORCH = (libraries.parameter, libraries.transposed, libraries.to_torch)
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


def trained(make, dtype, options):
    """A variable and the state after some steps, one of which has gradients that are not finite."""
    random = np.random.default_rng(0)
    variables = [make(random.normal(size=(3, 5)), dtype), make(random.normal(size=7), dtype)]
    optimizer = AdamW(0.01, **options)
    optimizer.build(variables)
    for step in range(7):
        numbers = [random.normal(size=tuple(v.shape)) for v in variables]
        if step == 4 and options.get("nonfinite") == "skip":
            numbers[0][0] = np.inf
        gradients = [make(number, dtype) for number in numbers]
        optimizer.apply(gradients)
    optimizer.apply([None, gradients[1]])
    return [*variables, *optimizer.variables]


def scaled():
    """What a dynamic loss scale makes of gradients that overflow, and its own state."""
    variable, optimizer = np.ones(4), LossScaleOptimizer(AdamW(0.01), initial_scale=8.0, dynamic_growth_steps=2)
    optimizer.build([variable])
    for gradient in (1.0, 2.0, np.inf, 3.0, 1.0):
        optimizer.apply([np.full(4, gradient) * float(optimizer.dynamic_scale)])
    return [variable, *optimizer.variables]


def saved():
    """A run that is saved, loaded into new arrays, and goes on."""
    variable, store = np.linspace(0, 1, 5), {}
    optimizer = AdamW(0.01, use_ema=True)
    optimizer.build({"w": variable})
    optimizer.apply([variable**2])
    optimizer.save(store, variables=True)
    other = np.zeros(5)
    loaded = AdamW.load(store, {"w": other})
    loaded.apply([other**2])
    return [other, *loaded.variables]


@numba.njit
def rosenbrock(x):
    value = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    slope = np.array([-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)])
    return value, slope


def minimized():
    result = minimize(rosenbrock, np.array([-1.0, 1.0]), jac=True, maxiter=200, bounds=[(-2, 2), (0, 2)])
    return [result.x, np.array([result.fun, result.nit])]


def shared():
    """Errors are the same: of arrays that overlap, and of a gradient in a variable's memory."""
    memory, told = np.ones(6), []
    optimizer = AdamW()
    optimizer.build([memory[:3]])
    for action in (
        lambda: AdamW().build([memory[:4], memory[3:]]),
        lambda: optimizer.apply([memory[1:4]]),
        lambda: optimizer.apply([np.ones(4)]),
        lambda: AdamW().build([np.broadcast_to(np.ones(1), 3)]),
    ):
        try:
            action()
        except ValueError as error:
            told.append(str(error))
    return told


SCENARIOS = {"scaled": scaled, "saved": saved, "minimized": minimized}


WITHOUT_TORCH = "torch" in os.environ.get("ADAMW_NUMBA_TESTS_WITHOUT", "").split()  # .ci/run sets it
HERE = [kind for kind, (make, _) in KINDS.items() if not (WITHOUT_TORCH and make in TORCH)]
CASES = [f"{kind}, {options}" for kind in HERE for options in OPTIONS] + list(SCENARIOS)
QUICK = ("float64", "parameter", "scaled", "saved")  # those that share their compiled kernels


def results(case):
    if case in SCENARIOS:
        return SCENARIOS[case]()
    kind, options = case.split(", ")
    return trained(*KINDS[kind], OPTIONS[options])


def plain(array):
    array = libraries.look(array)
    return array if array.dtype.kind in "fciu" else array.astype(np.float32)


def write(path):
    """In the other process: everything, into a file."""
    assert "numba" in sys.modules
    assert not hasattr(rosenbrock, "overloads")
    arrays = {f"{case}: {i}": plain(array) for case in CASES for i, array in enumerate(results(case))}
    np.savez(path, errors=np.array(shared()), **arrays)


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory):
    path, folder = tmp_path_factory.mktemp("uncompiled") / "results.npz", Path(__file__).parent
    places = os.pathsep.join(map(str, [folder, folder.parent, folder.parents[1]]))
    code = f"import warnings, test_disabled_jit as t; warnings.simplefilter('ignore'); t.write({str(path)!r})"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as file:
        return dict(file)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    "case", [case if case.startswith(QUICK) else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_same_numbers(case, uncompiled):
    for i, expected in enumerate(map(plain, results(case))):
        found = uncompiled[f"{case}: {i}"]
        kind = next((word for word in TOLERANCE if word in case), "float64")
        kind = "float32" if kind == "float64" and expected.dtype == np.float32 else kind
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[kind] * max(1, np.abs(expected).max()))


def test_the_same_errors(uncompiled):
    assert uncompiled["errors"].tolist() == shared()
    assert len(shared()) == 4
