"""What pytest leaves out where a library is missing: the fronts that are loaded by those who have it."""

import importlib.util
import os

FRONTS = ("keras", "optax", "torch")
collect_ignore_glob = [f"adamw_numba/{name}/*" for name in FRONTS if not importlib.util.find_spec(name)]
os.environ.setdefault("KERAS_BACKEND", "torch")  # of examples; tests/conftest.py decides for the tests
