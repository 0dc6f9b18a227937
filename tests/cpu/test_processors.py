"""Every dtype on processors of other kinds: nothing ends the process, and the numbers are right."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import libraries
from helpers.oracle import Oracle, pairs

from adamw_numba import AdamW

# By how much the numbers may differ from those in float64: of 16 bits, by no more than a variable is rounded at the end.
DTYPES = {
    "float16": 2e-3,
    "bfloat16": 1.6e-2,
    "float32": 1e-5,
    "float64": 1e-12,
    "complex64": 1e-5,
    "complex128": 1e-12,
}
OPTIONS = {  # all kernels, with all of their options
    "amsgrad": True,
    "use_ema": True,
    "ema_overwrite_frequency": 3,
    "clipvalue": 0.5,
    "gradient_accumulation_steps": 2,
    "loss_scale_factor": 4.0,
}
# What Numba compiles for: its name for a processor, and LLVM's for what the processor has.
PROCESSORS = {
    "any of this kind": ("generic", ""),
    "before float16": ("x86-64-v2", ""),
    "with float16": ("x86-64-v3", ""),
}


def trained(dtype):
    """The largest difference from the oracle, relative to the largest element, after some steps."""
    random = np.random.default_rng(0)

    def draw():
        real = random.normal(size=(5, 13))
        array = real + 1j * random.normal(size=real.shape) if dtype.startswith("complex") else real
        return libraries.numpy(array, dtype)

    variable = draw()
    optimizer, oracle = AdamW(0.01, nonfinite="skip", **OPTIONS), Oracle(0.01, **OPTIONS)
    optimizer.build([variable])
    oracle.build([to_plain(variable)])
    for _ in range(6):
        gradient = draw()
        optimizer.apply([gradient])
        oracle.step([to_plain(gradient)])
    (expected,) = oracle.variables
    return np.abs(pairs(to_plain(variable)) - expected).max() / np.abs(expected).max()


def to_plain(array):
    return array if array.dtype.kind in "fc" else array.astype(np.float64)


def report():
    for dtype in DTYPES:
        print(dtype, trained(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_dtype(kind):
    processor, features = PROCESSORS[kind]
    if processor != "generic" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a processor of x86")
    folder = Path(__file__).parent
    # The cache is that of all tests: Numba keeps apart in it what it has compiled for different processors.
    numba = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, [folder, folder.parent, folder.parents[1]]))}
    code = "import test_processors; test_processors.report()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | numba | paths)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = dict(map(str.split, done.stdout.splitlines()))
    assert differences.keys() == DTYPES.keys()
    for dtype, difference in differences.items():
        assert float(difference) < DTYPES[dtype], dtype
