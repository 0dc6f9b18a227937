"""What pytest leaves out where a library is missing: the front that is loaded by those who have it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["adamw_numba/torch/*"]
