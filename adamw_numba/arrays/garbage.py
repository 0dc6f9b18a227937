"""Python's garbage collector, held back where many objects are made that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Hold back the garbage collector, which would go through all that is made here again and again.

    Some twenty small objects for each of thousands of arrays, all of which stay: collections among them took a third of
    the time of `build`.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
