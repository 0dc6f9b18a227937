"""Tests of arrays on a GPU, and how they run where there is none.

With a GPU: ``pytest -m gpu``. Without one, test_simulator.py runs the same files in Numba's simulator, where the same
kernels read the host's memory; what the simulator cannot do is skipped there.
"""

import contextlib
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import torch
from hypothesis import HealthCheck, settings
from numba import config

SIMULATED = bool(config.ENABLE_CUDASIM)


def gpu_makers():
    """Every library that can make arrays on a GPU here, or why there is none."""
    if SIMULATED:
        return [libraries.on_gpu, libraries.gpu_strided], ""
    try:
        from numba import cuda

        if not cuda.is_available():
            return [], "no GPU here"
    except ImportError as error:
        return [], str(error)
    makers = [libraries.on_gpu]
    with contextlib.suppress(ImportError):
        import cupy  # noqa: F401

        makers += [libraries.to_cupy, libraries.cupy_fortran]
    if find_spec("torch") is not None and torch.cuda.is_available():
        makers += [libraries.torch_on_gpu, libraries.parameter_on_gpu, libraries.transposed_on_gpu]
    return makers, ""


MAKERS, REASON = gpu_makers()
MAKE = MAKERS[0] if MAKERS else None
HAS_TORCH = libraries.torch_on_gpu in MAKERS
marks = [pytest.mark.gpu, pytest.mark.skipif(not MAKERS, reason=REASON)]
if SIMULATED:  # NumPy's scalars warn of what a GPU does in silence
    marks.append(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
needs_gpu = pytest.mark.skipif(SIMULATED, reason="the simulator has no streams and no graphs")
on_every_library = pytest.mark.parametrize("make", MAKERS or [None], ids=lambda make: getattr(make, "__name__", "none"))
BOUNDED = settings(max_examples=6 if SIMULATED else 200, suppress_health_check=list(HealthCheck))


def make_the_simulator_give_way():
    """Have the simulator's loop, which looks after its threads without end, let them run first.

    Otherwise it holds the interpreter's lock for most of the time, and everything takes ten times as long.
    """
    from numba.cuda.simulator.kernel import BlockThread

    def is_alive(thread):
        time.sleep(0)
        return threading.Thread.is_alive(thread)

    BlockThread.is_alive = is_alive


if SIMULATED:
    make_the_simulator_give_way()


def array(values, dtype="float32"):
    return MAKE(np.asarray(values), dtype)


def tensor(values, dtype="float32"):
    """An array of torch, which captures graphs and has bfloat16; in the simulator any."""
    if SIMULATED:
        return array(values, dtype)
    if not HAS_TORCH:
        pytest.skip("torch has no GPU here")
    return libraries.torch_on_gpu(values, dtype)


def equal(one, other):
    return all(
        np.array_equal(libraries.look(a), libraries.look(b), equal_nan=True) for a, b in zip(one, other, strict=True)
    )
