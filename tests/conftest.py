"""Before anything imports Numba or Keras: a cache of kernels that belongs to these sources, and Keras on torch.

Keras's NumPy backend computes in float32 also where the variables are float64.
"""

import hashlib
import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "adamw_numba"
_sources = b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
_cache = Path(tempfile.gettempdir()) / f"adamw_numba-{os.getuid()}" / hashlib.sha256(_sources).hexdigest()[:16]
_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
os.environ["NUMBA_CACHE_DIR"] = str(_cache)
os.environ["NUMBA_NUM_THREADS"] = "5"  # also where there are fewer cores
os.environ["KERAS_BACKEND"] = "torch"

from hypothesis import settings  # noqa: E402

settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")
