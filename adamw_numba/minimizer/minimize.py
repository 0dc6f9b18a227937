"""`minimize`: AdamW as a function that minimizes a function, and as a method of `scipy.optimize.minimize`."""

import inspect
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from .. import arrays
from .. import hyperparameters as hp
from ..arrays.tree import Container, flatten, materialized, rebuild
from ..optimizer import HYPERPARAMETERS, SYNONYMS, AdamW
from . import objective, stopping
from .bounds import read_bounds
from .objective import Objective
from .run import Problem, Run, within
from .service import Keeper, Progress, caught_signals, explain

_tolerance = hp.real("a float >= 0, or None", lambda value: value >= 0, optional=True)
_seconds = hp.real("a number of seconds > 0, or None", lambda value: value > 0, optional=True)


def _flag_or_none(name: str, value: Any) -> bool | None:
    return None if value is None else hp.flag(name, value)


def _verbose(name: str, value: Any) -> bool:
    return bool(value) if hp.is_real(value) else hp.flag(name, value)


def _history(name: str, value: Any) -> int:
    return 1000 * value if isinstance(value, bool) else int(hp.integer(0, optional=False)(name, value))


def _progress(name: str, value: Any) -> Any:
    return value if callable(value) else hp.flag(name, value)


def _anything(name: str, value: Any) -> Any:
    return value


# Option -> default and check; AdamW's hyperparameters come on top.
_SETTINGS: dict[str, tuple[Any, hp.Check]] = {
    "maxiter": (10_000, hp.integer(0, optional=False)),
    "maxfev": (None, hp.integer(1)),
    "maxtime": (None, _seconds),
    "gtol": (1e-5, _tolerance),
    "ftol": (None, _tolerance),
    "xtol": (None, _tolerance),
    "patience": (None, hp.integer(1)),
    "disp": (False, _verbose),
    "progress": (False, _progress),
    "history": (True, _history),
    "return_best": (None, _flag_or_none),
    "checkpoint": (None, _anything),
    "state": (None, _anything),
    "nonfinite": ("stop", hp.choice("stop", "propagate", "skip", "raise")),
    "batches": (None, _anything),
    "workers": (None, _anything),
    "finite_diff_rel_step": (None, _anything),
    "callback_every": (1, hp.integer(1, optional=False)),
    "compiled": (True, hp.flag),
}
_HYPERPARAMETERS = ["learning_rate", *(key for key in HYPERPARAMETERS if key not in ("name", "nonfinite"))]


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    tol: float | None = None,
    **options: Any,
) -> Any:
    """Minimize a function with AdamW: by itself, or as ``scipy.optimize.minimize(..., method=adamw_numba.minimize)``.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)``, or ``fun(x, batch, *args)`` with `batches`; returns a number, or with ``jac=True`` the number
        and the gradient. With ``jac=True`` it may also be ``fun(x, gradient, *args)``, which fills the gradient (zeros)
        and returns the number. It gets copies. A Numba function runs inside a compiled loop.
    x0 : array, nested dict or list of arrays, or an earlier result
        Where to start; never written. Arrays of any library stay in it and on their device, integers become floats. A
        result goes on from its ``x_last`` with its ``state``.
    args : tuple, optional
        More arguments of `fun` and `jac`.
    jac : True, callable, {"torch", "jax"} or {"2-point", "3-point", "cs"}, optional
        Where the gradient comes from: `fun` itself, a function like it, a library that differentiates `fun`, or SciPy's
        finite differences (also the default, None).
    bounds : `scipy.optimize.Bounds`, or pairs ``(lower, upper)``, optional
        None stands for infinity; equal bounds fix an element. For nested `x0`, a dict or list like it of bounds or
        pairs. Every update is projected onto them.
    hess, hessp, constraints
        Not used, with a RuntimeWarning.
    callback : callable, optional
        ``callback(intermediate_result)`` (with exactly this name) or ``callback(xk)``, after every iteration (or
        ``callback_every``); `StopIteration` stops.
    tol : float, optional
        Sets ``gtol``.
    **options
        learning_rate, beta_1, beta_2, epsilon, amsgrad, clipnorm, clipvalue, global_clipnorm, use_ema, ... :
            As in `AdamW`; ``weight_decay`` is 0 by default, since decay moves the minimum.
        maxiter, maxfev : int
            The most updates (10,000) and evaluations of `fun` (no limit).
        maxtime : float
            In seconds.
        gtol : float, default 1e-5
            The largest element of the gradient, but for what pushes out of the bounds; None for off.
        ftol, xtol : float, optional
            Stop when, ten times in a row, `fun` changes by no more than ``ftol * max(|f|, |last f|, 1)``, or no element
            by more than ``xtol * (xtol + max |x|)``.
        patience : int, optional
            Stop when `fun` has not improved (by more than `ftol` asks for) for so many iterations.
        disp : bool
            Print a summary.
        progress : bool or callable
            A bar of tqdm, if it is installed and the output is a terminal; or a function of an intermediate result.
        history : bool or int, default 1000
            How many rows to keep: every iteration at first, then every second, fourth, ...
        return_best : bool
            Return the best point instead of the last; by default, unless there are `batches`.
        checkpoint : path or Checkpoints
            Where to save the state, and to go on from. SIGTERM and SIGINT then save and return status 130.
        state : dict
            AdamW's state of an earlier result.
        nonfinite : {"stop", "propagate", "skip", "raise"}
            What NaN and infinity do: stop with status 3 and the best point, or what they do in `AdamW`.
        batches : iterable or callable
            What `fun` gets after `x`: an iterable that is walked again and again, or a function of the iteration.
        workers : int or map-like, finite_diff_rel_step : float
            As in SciPy, for finite differences.
        callback_every : int, default 1
            Iterations from one call of `callback` to the next.
        compiled : bool, default True
            Whether a Numba function may run in a compiled loop.

    Returns
    -------
    result : `scipy.optimize.OptimizeResult`
        With ``x, fun, jac, nit, nfev, njev, status, success, message``, ``x_last`` and ``fun_last``, ``history`` (a
        dict of arrays: ``nit, fun, gradient_norm, learning_rate, step_norm, time``; norms are largest elements, the
        time is in seconds), ``state``, and ``x_average`` with ``use_ema``. Status 0: converged, 1: maxiter, 2: maxfev
        or maxtime, 3: not finite, 99: stopped by the callback, 130: interrupted.

    Raises
    ------
    TypeError, ValueError
        Before `fun` is called, if an argument is wrong; after it, if what it returns is.

    Warns
    -----
    OptimizeWarning
        If an option is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> def fun(x):
    ...     return ((x - 3) ** 2).sum(), 2 * (x - 3)
    >>> result = minimize(fun, np.zeros(2), jac=True, learning_rate=0.1)
    >>> result.success, result.x.round(3)
    (True, array([3., 3.]))
    """
    settings = read_settings(options, tol, hess, hessp, constraints)
    call = _call_of(callback)
    run = prepare(fun, x0, args, jac, bounds, settings)
    keeper = Keeper(settings["checkpoint"], run)
    result = _drive(run, settings, call, keeper)
    if settings["disp"]:
        _display(result)
    return result


# Reading the arguments


def read_settings(options: dict[str, Any], tol: Any, hess: Any, hessp: Any, constraints: Any) -> dict[str, Any]:
    """All options, checked, AdamW's apart under ``hyper``."""
    for name, value in (("hess", hess), ("hessp", hessp)):
        if value is not None:
            warnings.warn(f"Method AdamW does not use Hessian information ({name}).", RuntimeWarning, stacklevel=4)
    if not (constraints is None or (isinstance(constraints, (tuple, list)) and not constraints)):
        warnings.warn("Method AdamW cannot handle constraints.", RuntimeWarning, stacklevel=4)
    known = {**_SETTINGS, **dict.fromkeys(_HYPERPARAMETERS), "tol": None}
    unknown = [key for key in options if key not in known]
    if unknown:
        hints = "".join(f"; `{key}` is `{SYNONYMS[key]}` here" for key in unknown if key in SYNONYMS)
        _warn_of(f"Unknown solver options: {', '.join(unknown)}{hints}")
    settings = {key: check(key, options.get(key, default)) for key, (default, check) in _SETTINGS.items()}
    tol = _tolerance("tol", options.get("tol", tol))
    if tol is not None and "gtol" not in options:
        settings["gtol"] = tol
    hyper = {key: options[key] for key in _HYPERPARAMETERS if key in options}
    stops = settings["nonfinite"] == "stop"
    hyper["nonfinite"] = "propagate" if stops else settings["nonfinite"]
    return settings | {"hyper": {"weight_decay": 0.0} | hyper}


def _warn_of(message: str) -> None:
    category: Any = UserWarning
    with suppress(ImportError):
        from scipy.optimize import OptimizeWarning

        category = OptimizeWarning
    warnings.warn(message, category, stacklevel=5)


def _call_of(callback: Any) -> Callable[[Run], None] | None:
    """What calls the callback as SciPy does: by the name of its parameter."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"`callback` is {callback!r}; expected a function, or None")
    try:
        parameters = set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):
        parameters = set()
    if parameters == {"intermediate_result"}:
        return lambda run: callback(intermediate_result=run.intermediate())
    return lambda run: callback(run.intermediate().x)


def prepare(fun: Any, x0: Any, args: Any, jac: Any, bounds: Any, settings: dict[str, Any]) -> Run:
    """Check everything, and lay out a run; nothing is evaluated."""
    fun, jac = _unwrapped(fun, None if jac is False else jac)
    x0, state = _warm(x0, settings["state"])
    names, container, leaves = start(x0)
    args = args if isinstance(args, tuple) else (args,)
    objective.check(fun, jac, settings["batches"], leaves)
    pairs = read_bounds(bounds, names, leaves, isinstance(container, (dict, list, tuple)))
    leaves = leaves if pairs is None else within(leaves, pairs)
    target = Objective(
        fun, jac, args, container, names, settings["batches"], settings["workers"], settings["finite_diff_rel_step"]
    )
    best = settings["batches"] is None if settings["return_best"] is None else settings["return_best"]
    optimizer = AdamW(**settings["hyper"])
    problem = Problem(names, container, leaves, pairs)
    run = Run(target, problem, optimizer, _limits(settings), settings["history"], best)
    if state is not None:
        _load(optimizer, state)
    return run


def _unwrapped(fun: Any, jac: Any) -> tuple[Any, Any]:
    """SciPy hands over ``jac=True`` as a function that remembers its last value: undone, so that both doors are one."""
    owner: Any = getattr(jac, "__self__", None)
    if type(owner).__name__ == "MemoizeJac" and owner is fun:
        return owner.fun, True
    return fun, jac


def _warm(x0: Any, state: Any) -> tuple[Any, Any]:
    """Where an earlier result ended, and its state."""
    if isinstance(x0, Mapping) and "x_last" in x0 and "state" in x0:
        return x0["x_last"], x0["state"] if state is None else state
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(f"`state` is {state!r}; expected the `state` of an earlier result: a dict of arrays")
    return x0, state


def start(x0: Any) -> tuple[list[str], Container, list[Any]]:
    """The names, the container and copies of the arrays of `x0`, as floats.

    Raises
    ------
    TypeError
        If something is no array of real numbers.
    ValueError
        If it is empty, or a number is not finite.
    """
    if _is_numbers(x0):
        x0 = np.atleast_1d(np.asarray(x0))
    container = materialized(x0, "x0")
    names, leaves = flatten(container, "x0")
    if not leaves:
        raise ValueError("`x0` is empty; expected at least one array")
    copies = [_copy(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return names, rebuild(container, copies), copies


def _is_numbers(x0: Any) -> bool:
    if isinstance(x0, (numbers.Number, np.generic)):
        return True
    return isinstance(x0, (list, tuple)) and bool(x0) and all(map(_is_numbers, x0))


def _copy(name: str, leaf: Any) -> Any:
    what = "`x0`" if name == "0" else f"`x0` at {name!r}"
    if leaf is None:
        raise TypeError(f"{what} is None; expected an array")
    dtype = arrays.dtype_name(leaf)
    if isinstance(leaf, np.ndarray):
        if type(leaf) not in (np.ndarray, np.memmap):
            raise TypeError(f"{what} is a {type(leaf).__name__}; expected a plain numpy.ndarray")
        if dtype not in arrays.COMPUTE and leaf.dtype.kind not in "iub":
            raise TypeError(f"{what} has dtype {dtype}; expected real numbers: float32, float64, ...")
        leaf = leaf.astype(np.float64) if leaf.dtype.kind in "iub" else leaf.astype(leaf.dtype.newbyteorder("="))
        leaf = np.array(leaf, order="C", copy=True)
    elif dtype.startswith(("int", "uint", "bool")):
        xp = arrays.namespace(leaf)
        leaf = xp.astype(leaf, xp.__array_namespace_info__().default_dtypes()["real floating"])
    if arrays.is_complex(leaf):
        raise TypeError(f"{what} has dtype {dtype}; expected real numbers: pass the real and imaginary parts")
    copy = leaf if isinstance(leaf, np.ndarray) else arrays.like(leaf, leaf)
    arrays.check_variable(name, copy)
    if math.prod(copy.shape) == 0:
        raise ValueError(f"{what} has shape {tuple(copy.shape)}, which is empty; expected at least one element")
    xp = arrays.namespace(copy)
    if not bool(xp.all(xp.isfinite(copy))):
        raise ValueError(f"{what} holds NaN or infinity; expected finite numbers")
    return copy


def _limits(settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    limits = np.empty(stopping.HOW_MANY_LIMITS)
    for index, key in ((stopping.GTOL, "gtol"), (stopping.FTOL, "ftol"), (stopping.XTOL, "xtol")):
        limits[index] = -1 if settings[key] is None else settings[key]
    for index, key in ((stopping.PATIENCE, "patience"), (stopping.MAXITER, "maxiter"), (stopping.MAXFEV, "maxfev")):
        limits[index] = math.inf if settings[key] is None else min(settings[key], sys.maxsize)
    limits[stopping.STOP_AT_NONFINITE] = settings["nonfinite"] == "stop"
    return limits


def _load(optimizer: AdamW, state: Mapping[str, Any]) -> None:
    """Take AdamW's arrays from an earlier state; this call's learning rate, and its own counts, are kept."""
    kept = {"learning_rate"}
    own = optimizer.state
    needed = [name for name in own if name == "iteration" or ("/" in name and name not in kept)]
    if sorted(needed) != sorted(name for name in state if name not in kept):
        raise ValueError(f"`state` holds {sorted(state)}; expected {sorted(needed)}")
    optimizer.set_weights([state[name] if name in needed else array for name, array in own.items()])


# Going on until it stops


def _drive(run: Run, settings: dict[str, Any], call: Callable[[Run], None] | None, keeper: Keeper) -> Any:
    progress = Progress(settings["progress"], settings["maxiter"])
    with caught_signals(keeper.is_on) as signals:
        try:
            keeper.restore()
            run.start()
            loop = _loop([run]) if settings["compiled"] else None
            while not run.reason:
                if loop is None:
                    run.advance()
                else:
                    loop.advance(_until_service(run, settings, call, keeper))
                _serve(run, settings, call, keeper, signals)
                progress.show(run)
            keeper.finish()
        except BaseException as error:
            explain(error, run, keeper)
            raise
        finally:
            progress.close()
            run.objective.close()
    return run.result()


def drive_all(runs: Sequence[Run], loop: Any, settings: dict[str, Any]) -> None:
    """Advance many runs together until all have stopped."""
    progress = Progress(settings["progress"], settings["maxiter"])
    try:
        for run in runs:
            run.start()
        while going := [run for run in runs if not run.reason]:
            loop.advance(sys.maxsize)
            for run in going:
                _stop_in_time(run, settings)
            progress.show(min(going, key=lambda run: run.nit))
    except BaseException as error:
        explain(error, min(runs, key=lambda run: float(run.values[stopping.BEST])), Keeper(None, runs[0]))
        raise
    finally:
        progress.close()


def _loop(runs: Sequence[Run]) -> Any:
    """The compiled loop, where there can be one."""
    if "numba" not in sys.modules or not type(runs[0].objective.fun).__module__.startswith("numba."):
        return None
    from .compiled_loop import compiled_loop

    return compiled_loop(runs)


def _until_service(run: Run, settings: dict[str, Any], call: Any, keeper: Keeper) -> int:
    """How many iterations may pass before Python has something to do."""
    most = keeper.iterations_left()
    if call is not None:
        most = min(most, settings["callback_every"] - run.nit % settings["callback_every"])
    return most


def _serve(run: Run, settings: dict[str, Any], call: Any, keeper: Keeper, signals: list[int]) -> None:
    """What is due after an iteration, or after a block of them."""
    finite = run.reason != stopping.NONFINITE
    if call is not None and finite and (run.reason or run.nit % settings["callback_every"] == 0):
        try:
            call(run)
        except StopIteration:
            run.counts[stopping.REASON] = stopping.CALLBACK
    _stop_in_time(run, settings)
    if not run.reason and signals:
        run.counts[stopping.REASON] = stopping.INTERRUPTED
    if not run.reason:
        keeper.save_if_due()


def _stop_in_time(run: Run, settings: dict[str, Any]) -> None:
    if not run.reason and settings["maxtime"] is not None and run.elapsed > settings["maxtime"]:
        run.counts[stopping.REASON] = stopping.TIME


def _display(result: Any) -> None:
    """As SciPy's methods do: a summary, and a warning where it has not converged."""
    if result.success:
        print(result.message)
    else:
        warnings.warn(result.message, RuntimeWarning, stacklevel=3)
    print(f"         Current function value: {result.fun:f}")
    print(f"         Iterations: {result.nit:d}")
    print(f"         Function evaluations: {result.nfev:d}")
    print(f"         Gradient evaluations: {result.njev:d}")
