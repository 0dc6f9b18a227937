"""`minimize`: AdamW as a function that minimizes a function, and as a method of `scipy.optimize.minimize`."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..arrays.brief import brief
from ..hyperparameters.table import choice
from .driver import Callback, drive, prepare
from .options import Settings, read_settings
from .ranks import minimize_on_ranks


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
    comm: Any = None,
    value: str = "sum",
    replicated: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Minimize a function with AdamW: by itself, or as ``scipy.optimize.minimize(..., method=adamw_numba.minimize)``.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)``, or ``fun(x, batch, *args)`` with `batches`. It returns a number, or with ``jac=True`` the
        number and the gradient. With ``jac=True`` it may also be ``fun(x, gradient, *args)``, which fills the gradient
        (zeros at first) and returns the number. It gets copies. A Numba function runs inside a compiled loop;
        around a Python function of one NumPy array, everything else does.
    x0 : array, nested dict or list of arrays, or an earlier result
        Where to start; it is never written. Arrays of any library stay in that library and on their device; integers
        become floats. From an earlier result, the run goes on at its ``x_last`` with its ``state``.
    args : tuple, optional
        More arguments of `fun` and `jac`.
    jac : True, callable, {"torch", "jax"} or {"2-point", "3-point", "cs"}, optional
        Where the gradient comes from: `fun` itself, a function like it, a library that differentiates `fun`, or SciPy's
        finite differences (also the default, None).
    bounds : `scipy.optimize.Bounds`, or pairs ``(lower, upper)``, optional
        None stands for infinity; equal bounds fix an element. For a nested `x0`, a dict or list of the same structure
        with bounds or pairs in it. Every update is projected onto the bounds.
    hess, hessp, constraints
        Not used, with a RuntimeWarning.
    callback : callable, optional
        ``callback(intermediate_result)`` (with exactly this name) or ``callback(xk)``, after every iteration (or
        ``callback_every``); `StopIteration`, or to return True, stops.
    tol : float, optional
        Sets ``gtol``.
    comm : communicator of mpi4py, process group or device mesh of torch, or distributed.Ranks, optional
        Minimize together with other processes, each of which has its own part of the unknowns, or none: `x0`, `bounds`,
        ``x_scale`` and gradients, and the result's ``x``, are its own. All decide alike (docs/distributed.md). It needs
        gradients, and takes neither ``checkpoint`` nor ``polish``.
    value : {"sum", "same"}, default "sum"
        With `comm`: whether the value is the sum of what `fun` returns on all processes, or the same on all.
    replicated : list of str
        With `comm`: regular expressions for the names of arrays that all processes have, with the same values and
        gradients.
    **options
        learning_rate : "auto", float, schedule or function, default "auto"
            As in `AdamW`, a length in units of x. "auto" falls within `maxiter` from 0.3 times the size of each element
            (at least 0.3): more than 3,000 iterations in stages, each of which goes on from the best point, in units
            of the size of x there; so does a run after NaN, in smaller units. ``beta_2`` is then 0.9 by default; with
            `batches`, one gentle decay and 0.999.
        x_scale : float, array or container like `x0`, or "bounds"
            The unit of each element, or the widths of the bounds: AdamW moves ``x / x_scale``, all that it is given or
            reports is x. As in `scipy.optimize.least_squares`.
        beta_1, beta_2, epsilon, amsgrad, clipnorm, clipvalue, global_clipnorm, use_ema, ... :
            As in `AdamW`; ``weight_decay`` is 0 by default, since decay moves the minimum.
        maxiter, maxfev : int
            The most updates (10,000) and evaluations of `fun` (no limit; also ``maxfun``); None and infinity for none.
        maxtime : float
            In seconds.
        gtol : float, default 1e-5
            Stop when no element of the gradient is larger, except where it pushes out of the bounds; None for off.
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
            Return the best point instead of the last. The default is True without `batches`, else False.
        checkpoint : path or Checkpoints
            Where to save the run, and to resume it from. SIGTERM and SIGINT then save it and return status 130.
        state : dict
            AdamW's state of an earlier result.
        nonfinite : {"stop", "propagate", "skip", "raise"}
            What NaN and infinity do: stop the run with status 3 and the best point, or what they do in `AdamW`.
        batches : iterable or callable
            What `fun` gets after `x`: an iterable that is walked again and again, or a function of the iteration.
        workers : int, map-like or object with a ``map``; finite_diff_rel_step, eps : float or array
            For finite differences, as in SciPy; at most one of the steps, which are relative and absolute.
        polish : bool, "L-BFGS-B" or dict
            End with SciPy's L-BFGS-B (a dict: its options) from the best point, for smooth functions of NumPy arrays.
            Its iterations and evaluations count, and its rows of the history have no learning rate.
        return_all : bool
            The result's ``allvecs`` is then a list of x at the start and after each iteration.
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
    distributed.RankError
        If another process has failed, or they do not agree.

    Warns
    -----
    OptimizeWarning
        If an option is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> def fun(x):
    ...     return ((x - 3) ** 2).sum(), 2 * (x - 3)
    >>> result = minimize(fun, np.zeros(2), jac=True)
    >>> result.success, result.x.round(3)
    (True, array([3., 3.]))
    """

    def read() -> tuple[Settings, Callback | None]:
        choice("sum", "same")("value", value)
        return read_settings(options, tol, hess, hessp, constraints), call_of(callback)

    problem = fun, x0, args, jac, bounds
    if comm is None:
        settings, call = read()
        result, is_shown = drive(prepare(*problem, settings), settings, call), settings["disp"]
    else:
        result, is_shown = minimize_on_ranks(comm, read, value, replicated, problem)
    if is_shown:
        _display(result)
    return result


def call_of(callback: Any) -> Callback | None:
    """What calls the callback as SciPy does: by the name of its parameter."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"`callback` is {brief(callback)}; expected a function, or None")
    try:
        parameters = set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):
        parameters = set()
    if parameters == {"intermediate_result"}:
        return lambda run: callback(intermediate_result=run.intermediate())
    return lambda run: callback(run.intermediate().x)


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
