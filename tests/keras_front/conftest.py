import importlib.util

import pytest

if any(importlib.util.find_spec(name) is None for name in ("keras", "torch", "jax")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of torch's own only get in each other's way where arrays are tiny and tests run side by side."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def names_from_the_start():
    """Keras numbers what has no name, and goes on doing so from test to test."""
    keras = pytest.importorskip("keras")
    keras.backend.clear_session(free_memory=False)
