"""Steps over four devices (of the host), in a process of their own: see helpers/four_devices.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.four_devices import CASES

TESTS = Path(__file__).parents[1]
FLAGS = "--xla_force_host_platform_device_count=4"


@pytest.fixture(scope="module")
def found():
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "helpers.four_devices"]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_over_four_devices(case, found):
    assert found[case] == "", found[case]
