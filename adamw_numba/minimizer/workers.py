"""A map over several processes: what SciPy's methods call `workers`."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..arrays.brief import brief


def check_workers(workers: Any) -> None:
    """Refuse what maps nothing.

    Raises
    ------
    ValueError
        If it is no number of processes, function, or object with a ``map``.
    """
    is_count = isinstance(workers, (int, np.integer)) and not isinstance(workers, bool)
    if workers is None or callable(workers) or callable(getattr(workers, "map", None)):
        return
    if not is_count or not (workers == -1 or 1 <= workers < 2**31):
        raise ValueError(
            f"`workers` is {brief(workers)}; expected an integer >= 1, -1, a function like `map`, or an object with one"
        )


@contextmanager
def mapper(workers: Any) -> Iterator[Callable[..., Any]]:
    """What maps a function over items: `workers` itself or its ``map``, the built-in `map`, or so many processes."""
    if callable(getattr(workers, "map", None)):
        yield partial(_gathered, workers.map)
    elif callable(workers):
        yield partial(_gathered, workers)
    elif workers in (None, 1):
        yield map
    else:
        from concurrent.futures import ProcessPoolExecutor

        count = (os.cpu_count() or 1) if workers == -1 else workers
        pool = ProcessPoolExecutor(count)
        try:
            yield partial(_map_in_chunks, pool, count)
        finally:
            pool.shutdown(cancel_futures=True)


# Generators: SciPy takes a TypeError that is raised while it calls a map for a map of the wrong form.


def _gathered(mapped: Callable[..., Any], function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """All results, those that come as futures (of Dask's client, say) included."""
    for one in list(mapped(function, items)):
        yield one.result() if callable(getattr(one, "result", None)) else one


def _map_in_chunks(pool: Any, count: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    items = list(items)
    try:  # a pool that cannot send its work may never end
        pickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"`workers` asks for processes, to which `fun` and its arguments cannot be sent ({brief(str(error))}); "
            "expected a function that a module defines, or workers=1"
        ) from None
    # A few chunks for each process: one alone would wait for the slowest, single items cost a message each.
    yield from pool.map(function, items, chunksize=max(1, len(items) // (4 * count)))
