"""The tests of the front's numbers once more, in processes in which Keras's backend is JAX.

The others can be run so by hand: ``ADAMW_NUMBA_TESTS_KERAS=jax python -m pytest tests/keras_front``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.keras_runs import IS_TORCH

FOLDER = Path(__file__).parent
FILES = ["test_keras_fit", "test_keras_moments", "test_keras_steps"]


@pytest.mark.slow
@pytest.mark.skipif(not IS_TORCH, reason="this is that process")
@pytest.mark.parametrize("name", FILES)
def test_on_jax(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    environment = os.environ | {"ADAMW_NUMBA_TESTS_KERAS": "jax", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=900, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
