"""What pytest leaves out where a library is missing: the fronts that are loaded by those who have it."""

import importlib.util

FRONTS = ("torch", "optax")
collect_ignore_glob = [f"adamw_numba/{name}/*" for name in FRONTS if not importlib.util.find_spec(name)]
