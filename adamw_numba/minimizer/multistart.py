"""Many starts of one minimization: in one compiled parallel loop if the objective is a Numba function, else mapped."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np

from .. import arrays
from ..arrays.brief import brief
from ..hyperparameters.table import flag
from .driver import compiled, drive_all, drive_together, prepare
from .minimize import call_of, minimize
from .objective import is_compiled
from .options import read_settings
from .result import new_result
from .workers import check_workers, mapper

_MOST = 2**30  # points of a Sobol sequence


def multistart(
    fun: Callable[..., Any],
    x0s: Any,
    args: Any = (),
    *,
    jac: Any = None,
    bounds: Any = None,
    workers: Any = 1,
    rng: Any = None,
    vectorized: bool = False,
    tol: float | None = None,
    **options: Any,
) -> Any:
    """Minimize from many starting points.

    A Numba function (see `minimize`) is minimized from all starts at once, on all threads, in one compiled loop.

    Parameters
    ----------
    fun, args, jac, bounds, tol, **options
        As in `minimize`, except for ``checkpoint`` and ``comm``.
    x0s : array of shape (starts, ...), list of starting points, or int
        An integer asks for so many points of a Sobol sequence (`scipy.stats.qmc`) within the bounds, which must be
        finite: `scipy.optimize.Bounds` of arrays, or pairs.
    workers : int, map-like, or object with a ``map``, default 1
        How many processes to use if the objective is no Numba function (-1 for all cores); or a function like `map`, an
        executor of `concurrent.futures`, a client of Dask, a pool of `multiprocessing` or of mpi4py. Futures are
        waited for.
    rng : int or `numpy.random.Generator`, optional
        Scrambles the Sobol sequence.
    vectorized : bool, default False
        Evaluate all starts in one call: `fun` gets them stacked, of shape (starts, ...), and returns values of shape
        (starts,); gradients are stacked like x. Starts that have stopped are left out of later calls (with JAX they
        stay, so that nothing is traced again). Each start has the result that it would have alone.

    Returns
    -------
    result : `scipy.optimize.OptimizeResult`
        The best one; its ``results`` are all of them, the best first.

    Raises
    ------
    TypeError, ValueError
        As `minimize`; if there is no start, or the bounds of Sobol points are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> def fun(x):
    ...     return (np.cos(x) + x / 10).sum(), -np.sin(x) + 1 / 10
    >>> best = multistart(fun, np.linspace(-9, 9, 5)[:, None], jac=True, learning_rate=0.1, bounds=[(-10, 10)])
    >>> best.x.round(3), len(best.results)
    (array([-9.525]), 5)
    """
    if options.get("checkpoint") is not None:
        where = brief(options["checkpoint"])
        raise ValueError(f"`checkpoint` is {where}; expected None: many starts have no single state")
    if options.get("comm") is not None:
        raise ValueError(
            f"`comm` is {brief(options['comm'])}; expected None: one process minimizes from a start, and `workers` may "
            "be an executor of mpi4py"
        )
    check_workers(workers)
    vectorized = flag("vectorized", vectorized)
    starts = _starts(x0s, bounds, rng)
    if vectorized:
        return _sorted(_in_step(fun, starts, args, jac, bounds, tol, options))
    results = _in_compiled_loop(fun, starts, args, jac, bounds, tol, options)
    if results is None:
        one = partial(_one, fun, args, {"jac": jac, "bounds": bounds, "tol": tol, **options})
        with mapper(workers) as mapped:
            results = list(mapped(one, starts))
        if len(results) != len(starts):
            raise ValueError(f"`workers` gave {len(results)} results; expected {len(starts)}, one for each start")
    return _sorted(results)


def _sorted(results: list[Any]) -> Any:
    """The best result, with all of them."""
    results = sorted(results, key=lambda result: result.fun if math.isfinite(result.fun) else math.inf)
    return new_result({**deepcopy(dict(results[0])), "results": results})


def _one(fun: Any, args: Any, keywords: dict[str, Any], x0: Any) -> Any:
    try:
        return minimize(fun, x0, args, **keywords)
    except StopIteration as error:  # it would end the map, and leave out the other starts
        raise RuntimeError("`fun` raised StopIteration") from error


def _starts(x0s: Any, bounds: Any, rng: Any) -> list[Any]:
    if isinstance(x0s, (int, np.integer)) and not isinstance(x0s, bool):
        return _sobol(int(x0s), bounds, rng)
    x0s = arrays.seen(x0s, "`x0s`")
    if not (arrays.is_array(x0s) or isinstance(x0s, (list, tuple))):
        raise TypeError(f"`x0s` is {brief(x0s)}; expected an array of starts, a list of them, or how many")
    if arrays.is_array(x0s) and x0s.ndim < 2:
        raise ValueError(f"`x0s` has shape {tuple(x0s.shape)}; expected (starts, ...)")
    starts = [x0s[k, ...] for k in range(x0s.shape[0])] if arrays.is_array(x0s) else list(x0s)
    if not starts:
        raise ValueError("`x0s` holds no start; expected at least one")
    return starts


def _sobol(count: int, bounds: Any, rng: Any) -> list[Any]:
    if not 1 <= count <= _MOST:
        raise ValueError(f"`x0s` is {brief(count)}; expected from 1 to {_MOST} starts")
    if bounds is None:
        raise ValueError(
            f"`x0s` is {brief(count)} and `bounds` is None; expected finite bounds to draw the starts from"
        )
    try:
        from scipy.stats import qmc
    except ImportError:
        raise ImportError(
            "Sobol points need SciPy: pip install 'adamw-numba[scipy]', or give the starts as an array"
        ) from None
    lower, upper = _box(bounds)
    # A power of two, cut: Sobol points are evenly spread only in such numbers, and SciPy warns of others.
    try:
        sequence = qmc.Sobol(lower.size, rng=rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`rng` is {brief(rng)}; expected None, an integer or a generator of NumPy") from None
    points = sequence.random_base2(max(1, math.ceil(math.log2(count))))[:count]
    return list(lower + points * (upper - lower))


def _box(bounds: Any) -> Any:
    """The lower and the upper bounds of all elements."""
    if hasattr(bounds, "lb"):
        lower, upper = np.broadcast_arrays(*np.atleast_1d(bounds.lb, bounds.ub))
    else:
        try:
            lower, upper = np.array([(-np.inf if a is None else a, np.inf if b is None else b) for a, b in bounds]).T
        except (TypeError, ValueError):
            raise ValueError(f"`bounds` is {brief(bounds)}; expected a pair for each element, or `Bounds`") from None
    if lower.ndim != 1 or not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower <= upper).all()):
        raise ValueError(
            f"`bounds` are {brief(lower.tolist())} and {brief(upper.tolist())}; expected finite ones, lower <= upper, "
            "to draw the starts from"
        )
    return lower, upper


def _in_step(
    fun: Any, starts: Sequence[Any], args: Any, jac: Any, bounds: Any, tol: Any, options: dict[str, Any]
) -> list[Any]:
    for key in ("polish", "return_all"):
        if options.get(key):
            raise ValueError(f"`{key}` is {brief(options[key])} and `vectorized` is True; expected one of them")
    settings, callback = _settings_of(options, tol)
    runs = [prepare(fun, x0, args, jac, bounds, settings) for x0 in starts]
    drive_together(runs, settings, callback)
    return [run.result() for run in runs]


def _settings_of(options: dict[str, Any], tol: Any) -> Any:
    """The settings of all runs, and what calls their callback."""
    unused = {key: options.get(key) for key in ("hess", "hessp", "constraints")}
    given = {key: value for key, value in options.items() if key != "callback" and key not in unused}
    return read_settings(given, tol, **unused), call_of(options.get("callback"))


def _in_compiled_loop(
    fun: Any, starts: Sequence[Any], args: Any, jac: Any, bounds: Any, tol: Any, options: dict[str, Any]
) -> list[Any] | None:
    """All results, or None where Python is needed at each step."""
    if not is_compiled(fun) or not options.get("compiled", True):
        return None
    if options.get("callback") is not None or options.get("return_all"):
        return None
    settings, _ = _settings_of(options, tol)
    runs = [prepare(fun, x0, args, jac, bounds, settings) for x0 in starts]
    if len({(len(run.names), run.get("x")[0].shape, run.get("x")[0].dtype) for run in runs}) > 1:
        return None
    loop = compiled(runs)
    if loop is None:
        return None
    drive_all(runs, loop, settings)
    return [run.result() for run in runs]
