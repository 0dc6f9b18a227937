"""The GPU tests themselves, as far as they can be tested without a GPU: what they need, and the arrays they start from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import libraries

ROOT = Path(__file__).parents[2]
NOT_NEEDED = [
    "array_api_strict", "h5py", "jax", "keras", "matplotlib", "moto", "obstore", "optax", "optree", "pytest_benchmark",
    "s3fs", "safetensors", "scipy", "tqdm", "xdist", "zarr",
]  # fmt: skip
WITHOUT = """
import sys, pytest
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in sys.argv else find(name, *rest)
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


@pytest.mark.parametrize("absent", [NOT_NEEDED, [*NOT_NEEDED, "torch"]], ids=["torch", "no torch"])
def test_few_packages_are_needed(absent):
    """Every GPU test is found where nothing is installed but NumPy, Numba, numba-cuda, pytest, hypothesis and ml_dtypes."""
    pytest.importorskip("numba_cuda")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("ADAMW_NUMBA_TESTS_WITHOUT", None)
    command = [sys.executable, "-c", WITHOUT, *absent]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    found = set(re.findall(r"tests/gpu/(\w+)\.py::", ran.stdout))
    names = ("arrays", "calls", "counting", "graphs", "groups", "numbers", "remainders", "small_moments")
    assert found == {f"test_gpu_{name}" for name in names}
    assert "SKIPPED" not in ran.stdout


@pytest.mark.parametrize("make", [libraries.to_torch, libraries.parameter, libraries.transposed])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_tensors_start_from_the_values_of_arrays(make, dtype):
    """A little more than halfway between two numbers of float16: in two roundings, it becomes the lower one."""
    values = np.array([1 + 2.0**-11 + 2.0**-30, -3.3, 1e9])
    with np.errstate(over="ignore"):
        expected = libraries.numpy(values, dtype)
    found = libraries.look(make(values, dtype))
    np.testing.assert_array_equal(found, expected.astype(found.dtype))
    assert dtype != "float16" or found[0] > 1
    assert libraries.look(make(1.5, dtype)).shape == ()


@pytest.mark.parametrize("make", [libraries.to_cupy, libraries.cupy_fortran])
def test_cupy_arrays_keep_their_shape(make, monkeypatch):
    """With NumPy in place of CuPy, whose `asfortranarray` also adds an axis to an array of none."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    for shape in [(), (3,), (2, 3)]:
        array = make(np.ones(shape), "float32")
        assert (array.shape, array.dtype) == (shape, np.float32)
        assert array.flags["F_CONTIGUOUS" if make is libraries.cupy_fortran else "C_CONTIGUOUS"]
