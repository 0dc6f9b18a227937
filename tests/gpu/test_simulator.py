"""The kernels of the GPU, without a GPU: each file of GPU tests in Numba's simulator, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")

HERE = Path(__file__).parent
PASS = {  # at least
    "test_gpu_arrays": 9,
    "test_gpu_calls": 14,
    "test_gpu_counting": 15,
    "test_gpu_graphs": 16,
    "test_gpu_groups": 14,
    "test_gpu_numbers": 75,
    "test_gpu_remainders": 30,
    "test_gpu_small_moments": 95,
}


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=() if file == "test_gpu_arrays" else pytest.mark.slow) for file in PASS]
)
def test_the_gpu_tests_pass_in_the_simulator(file):
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / f"{file}.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= PASS[file]
    assert "deselected" not in result.stdout


def test_no_file_of_gpu_tests_is_left_out():
    marked = {path.stem for path in HERE.parent.rglob("test_*.py") if "\npytestmark = marks\n" in path.read_text()}
    assert marked == set(PASS)
    assert sum(PASS.values()) > 80
