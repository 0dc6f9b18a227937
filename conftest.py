"""What pytest leaves out where a library is missing: the fronts that are loaded by those who have it."""

import importlib.util
import os

collect_ignore_glob = [f"adamw_numba/{name}/*" for name in ("keras", "torch") if importlib.util.find_spec(name) is None]
os.environ.setdefault("KERAS_BACKEND", "torch")  # of examples; tests/conftest.py decides for the tests
