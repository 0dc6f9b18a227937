"""What pytest leaves out where a library is missing: the fronts that are loaded by those who have it."""

import importlib.util
import os

FRONTS = {"keras": ["keras/*"], "optax": ["optax/*"], "torch": ["torch/*", "interop/dcp.py"]}
collect_ignore_glob = [
    f"adamw_numba/{place}" for name, those in FRONTS.items() if not importlib.util.find_spec(name) for place in those
]
os.environ.setdefault("KERAS_BACKEND", "torch")  # of examples; tests/conftest.py decides for the tests
