import importlib.util

import pytest

if any(importlib.util.find_spec(name) is None for name in ("keras", "torch", "jax")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def names_from_the_start():
    """Keras numbers what has no name, and goes on doing so from test to test."""
    keras = pytest.importorskip("keras")
    keras.backend.clear_session(free_memory=False)
