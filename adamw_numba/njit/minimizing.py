"""`minimize` for users' own compiled code: the run of running.py around an objective of theirs."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from ..arrays.brief import brief
from ..cpu.kernels import LIKE, on
from ..hyperparameters import table as hp
from .arguments import (
    alone,
    bound_of,
    bounded,
    check_start,
    dtype_of,
    flat_copy,
    itself,
    limits_of,
    objective_of,
    unbounded,
    value_or,
)
from .calls import as_c_function
from .literals import MODES, check_numbers, flag, is_none, literal_mode
from .rates import EXPECTED_RATE, rate_of
from .running import FUN_RAISED, MOST_ROWS, RATE_RAISED, Numbers, Ways, run
from .stepping import INLINED, checked_coefficients


class Result(NamedTuple):
    """What `minimize` found.

    Attributes
    ----------
    x : array
        The best point: of the shape of `x0`, or the last one where no value was finite.
    fun : float
        The value there.
    nit : int
        Iterations.
    status : int
        0: converged, 1: maxiter, 2: maxfev, 3: not finite; as of `adamw_numba.minimize`.
    """

    x: Any
    fun: Any
    nit: Any
    status: Any


def minimize(
    fun: Any,
    x0: Any,
    args: Any = (),
    learning_rate: Any = "auto",
    maxiter: int = 10_000,
    jac: Any = True,
    lower: Any = None,
    upper: Any = None,
    gtol: float | None = 1e-5,
    ftol: float | None = None,
    xtol: float | None = None,
    patience: int | None = None,
    maxfev: int | None = None,
    weight_decay: float = 0.0,
    beta_1: float = 0.9,
    beta_2: float | None = None,
    epsilon: float = 1e-7,
    clipvalue: float | None = None,
    amsgrad: bool = False,
    nesterov: bool = False,
    epsilon_mode: str = "hat",
    decouple_lr: bool = False,
) -> Any:
    """Minimize a compiled function inside compiled code: the bits of `adamw_numba.minimize`, without Python.

    It can be called in functions of `numba.njit`, also with ``parallel=True`` (in the body of a parallel loop, each
    thread has minimizations of its own) and ``cache=True``, and in Python.

    Parameters
    ----------
    fun : function of `numba.njit`
        ``fun(x, *args)``, which returns a number and the gradient, or ``fun(x, gradient, *args)``, which fills the
        gradient (zeros at first) and returns the number. With `jac`, it returns the number alone.
    x0 : array of float32 or float64, of at least one dimension
        Where to start; it is only read. Integers become float64.
    args : tuple, optional
        More arguments of `fun` and `jac`, of any type that Numba knows.
    learning_rate : "auto", float, array or function of `numba.njit`, default "auto"
        As in `adamw_numba.minimize`; an array holds a rate for each iteration, of a schedule for example, and a
        function is called with the number of the iteration.
    maxiter : int, default 10,000
        The most iterations.
    jac : True or function of `numba.njit`, default True
        Where the gradient comes from: `fun`, or ``jac(x, *args)``.
    lower, upper : float or array like `x0`, optional
        Bounds, onto which every update is projected.
    gtol, ftol, xtol, patience, maxfev
        As in `adamw_numba.minimize`; None is off.
    weight_decay : float, default 0
    beta_1, beta_2, epsilon, clipvalue : float
        As in `AdamW`; without a `beta_2`, it is 0.9 where the learning rate is "auto", and 0.999 elsewhere.
    amsgrad, nesterov, epsilon_mode, decouple_lr
        As in `AdamW`. In compiled code, all but the last have to be literals, as "auto" has.

    Returns
    -------
    result : Result
        A named tuple: ``x, fun, nit, status``.

    Raises
    ------
    ValueError
        If a number is out of its range, a shape does not fit, or `x0` is not finite; `fun` is not called then.
    numba.core.errors.TypingError
        When a function is compiled, and in Python: if a type is another one than expected.
    Exception
        What `fun` raises, when it is called again with the same x.

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> @numba.njit
    ... def bowl(x, center):
    ...     return ((x - center) ** 2).sum(), 2 * (x - center)
    >>> @numba.njit
    ... def distance(center):
    ...     found = minimize(bowl, np.zeros(2), (center,))
    ...     return found.status, found.x.sum()
    >>> status, total = distance(3.0)
    >>> status, round(total, 4)
    (0, 6.0)
    """
    automatic = isinstance(learning_rate, str)
    if automatic and learning_rate != "auto":
        raise ValueError(f"`learning_rate` is {brief(learning_rate)}; expected {EXPECTED_RATE}")
    for name, value in (("amsgrad", amsgrad), ("nesterov", nesterov), ("decouple_lr", decouple_lr)):
        hp.flag(name, value)
    hp.choice(*MODES)("epsilon_mode", epsilon_mode)
    door = _door(amsgrad, nesterov, epsilon_mode, automatic, jac is True)
    rest = (maxiter, lower, upper, gtol, ftol, xtol, patience, maxfev, weight_decay, beta_1, beta_2, epsilon)
    return door(fun, np.asarray(x0), args, 0.0 if automatic else learning_rate, jac, *rest, clipvalue, decouple_lr)


# Inlined, so that no function is passed on as a value: Numba cannot cache the code that does.
@overload(minimize, prefer_literal=True, jit_options=INLINED)
def _overload_minimize(
    fun,
    x0,
    args=(),
    learning_rate="auto",
    maxiter=10_000,
    jac=True,
    lower=None,
    upper=None,
    gtol=1e-5,
    ftol=None,
    xtol=None,
    patience=None,
    maxfev=None,
    weight_decay=0.0,
    beta_1=0.9,
    beta_2=None,
    epsilon=1e-7,
    clipvalue=None,
    amsgrad=False,
    nesterov=False,
    epsilon_mode="hat",
    decouple_lr=False,
):
    check_start(x0)
    numbers = {"maxiter": maxiter, "weight_decay": weight_decay, "beta_1": beta_1, "epsilon": epsilon}
    optional = {"gtol": gtol, "ftol": ftol, "xtol": xtol, "patience": patience, "maxfev": maxfev, "beta_2": beta_2}
    check_numbers(**numbers, **{name: kind for name, kind in optional.items() if not is_none(kind)})
    like = LIKE[dtype_of(x0).name]
    evaluated, raise_again = objective_of(fun, jac, x0, args)
    rate_at, rate_data, automatic = rate_of(learning_rate)
    top, lead, limit = flag("amsgrad", amsgrad), flag("nesterov", nesterov), on(not is_none(clipvalue))
    is_corrected = literal_mode(epsilon_mode)
    lowest, highest = bound_of("lower", lower, x0), bound_of("upper", upper, x0)
    within = unbounded if is_none(lower) and is_none(upper) else bounded
    tuple_of = itself if isinstance(args, types.BaseTuple) or args == () else alone
    usual_beta_2 = 0.9 if automatic else 0.999

    def compiled(
        fun,
        x0,
        args=(),
        learning_rate="auto",
        maxiter=10_000,
        jac=True,
        lower=None,
        upper=None,
        gtol=1e-5,
        ftol=None,
        xtol=None,
        patience=None,
        maxfev=None,
        weight_decay=0.0,
        beta_1=0.9,
        beta_2=None,
        epsilon=1e-7,
        clipvalue=None,
        amsgrad=False,
        nesterov=False,
        epsilon_mode="hat",
        decouple_lr=False,
    ):
        limits = limits_of(
            value_or(gtol, -math.inf),
            value_or(ftol, -math.inf),
            value_or(xtol, -math.inf),
            value_or(patience, math.inf),
            np.float64(maxiter),
            value_or(maxfev, math.inf),
        )
        second = value_or(beta_2, usual_beta_2)
        # Checked, with a learning rate of 0 in the place of all.
        checked_coefficients(
            0,
            0.0,
            weight_decay,
            beta_1,
            second,
            epsilon,
            1.0,
            value_or(clipvalue, math.inf),
            lead is not None,
            is_corrected,
            bool(decouple_lr),
        )
        x = flat_copy(x0, like)
        least, most = within(lowest(lower, x0, -math.inf), highest(upper, x0, math.inf), x)
        given, stage = rate_data(learning_rate, limits)
        data = (tuple_of(args), x0.shape)
        evaluate, words = as_c_function(evaluated, data)
        rate, rate_words = as_c_function(rate_at, given)
        numbers = Numbers(
            np.float64(weight_decay),
            np.float64(beta_1),
            second,
            np.float64(epsilon),
            value_or(clipvalue, math.inf),
            is_corrected,
            lead is not None,
            bool(decouple_lr),
        )
        ways = Ways(evaluate, words, rate, rate_words)
        end, value, nit, step, status = run(x, least, most, ways, numbers, limits, stage, automatic, top, limit, lead)
        if end == FUN_RAISED:
            raise_again(x, data)
        if end == RATE_RAISED:
            for at in range(step, step + MOST_ROWS):  # it raised at one of these
                rate_at(at, 0, given)
            raise RuntimeError("`learning_rate` raised an exception, but not when it was called again")
        return Result(x.reshape(x0.shape), value, nit, status)

    return compiled


@cache
def _door(amsgrad, nesterov, epsilon_mode, is_automatic, jac_is_true):
    """`minimize` for Python, with literals for what has to be one."""
    automatic = "auto"

    def door(
        fun, x0, args, learning_rate, jac, maxiter, lower, upper, gtol, ftol, xtol, patience, maxfev, weight_decay,
        beta_1, beta_2, epsilon, clipvalue, decouple_lr
    ):  # fmt: skip
        return minimize(
            fun, x0, args, automatic if is_automatic else learning_rate, maxiter, True if jac_is_true else jac,
            lower, upper, gtol, ftol, xtol, patience, maxfev, weight_decay, beta_1, beta_2, epsilon, clipvalue,
            amsgrad, nesterov, epsilon_mode, decouple_lr
        )  # fmt: skip

    return njit(door)
