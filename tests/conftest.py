"""Before anything imports Numba or Keras: a cache of kernels that belongs to these sources, and Keras on torch.

Keras's NumPy backend computes in float32 also where the variables are float64.
"""

import hashlib
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore = ["helpers"]
PACKAGE = Path(__file__).parents[1] / "adamw_numba"
_sources = b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
_cache = Path(tempfile.gettempdir()) / f"adamw_numba-{os.getuid()}" / hashlib.sha256(_sources).hexdigest()[:16]
_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
os.environ["NUMBA_CACHE_DIR"] = str(_cache)
os.environ["NUMBA_NUM_THREADS"] = "5"  # also where there are fewer cores
os.environ["KERAS_BACKEND"] = os.environ.get("ADAMW_NUMBA_TESTS_KERAS", "torch")  # see test_keras_on_jax.py
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # for JAX: devices that arrays are divided over

from hypothesis import settings  # noqa: E402

settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")

# Tests that use one of these are skipped where it is missing, but only where that is said to be so.
COMPARED = ("torch", "jax", "keras", "optax")
MAY_BE_MISSING = os.environ.get("ADAMW_NUMBA_TESTS_WITHOUT", "").split()


# With `-m gpu` only these files are looked at, which run with few packages, in whatever versions a machine has.
GPU_TESTS = Path(__file__).parent / "gpu"
FOREIGN = r"(?!adamw_numba|helpers|test_)"  # modules


def only_gpu(config):
    return config.option.markexpr == "gpu"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist, have the kernels that a file's tests share compiled by one worker."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # files with slow tests come first: see below


def pytest_configure(config):
    if only_gpu(config):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{FOREIGN}")
        config.addinivalue_line("filterwarnings", "ignore::UserWarning:cupy")  # of what it does not find
        return
    missing = [name for name in COMPARED if name not in MAY_BE_MISSING and find_spec(name) is None]
    if missing:
        raise pytest.UsageError(
            f"{', '.join(missing)}: not installed; expected the extra `test`, or "
            f'ADAMW_NUMBA_TESTS_WITHOUT="{" ".join(missing)}" in the environment to skip the tests that need them'
        )


def pytest_ignore_collect(collection_path, config):
    """Leave out files that import at their top what is missing; others skip the tests that need it."""
    if only_gpu(config):
        return True if collection_path.is_file() and GPU_TESTS not in collection_path.parents else None
    missing = [name for name in MAY_BE_MISSING if find_spec(name) is None]
    if missing and collection_path.suffix == ".py":
        top = rf"^(?:import|from) (?:{'|'.join(missing)})\b"
        return True if re.search(top, collection_path.read_text(), re.M) else None
    return None


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, and of each its slow tests, so that all workers end at about the same time.

    A file's tests stay together: kernels compiled in a process are not compiled again in another.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
