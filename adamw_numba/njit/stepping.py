"""`step` and `coefficients`: the formula of update.py for users' own compiled code.

A flag (``nesterov``, or whether there is a clip) is part of what is compiled, so it has to be a literal there: `on`.
"""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from .. import coefficients as common
from ..arrays.brief import brief
from ..arrays.compiled import jit, jit_for_python, pointer
from ..cpu.blocks import cast_coefficients
from ..cpu.intrinsics import exchange_mode, mode_for
from ..cpu.kernels import LIKE, on, update_chunk
from ..update import Coefficients
from .calls import call_apart
from .checks import check_apart, check_arrays, check_shapes
from .literals import MODES, check_step, flag, is_none, literal_mode

# As in Python: nothing is contracted, and nothing is taken over from the options of the user's function.
EXACT = {"error_model": "numpy", "fastmath": False, "forceinline": False}
INLINED = EXACT | {"forceinline": True}
for function in (common.log, common.correction, common.step_size, common.varying_of):
    register_jitable(**INLINED)(function)
_varying_of = common.varying_of

# The coefficients of a step


@jit
def _check_step(number, learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit):
    if number < 0:
        raise ValueError("`number` must be an integer >= 0: how many steps came before. Received:", number)
    if not 0 <= learning_rate < math.inf:
        raise ValueError("`learning_rate` must be a finite float >= 0. Received:", learning_rate)
    if not 0 <= weight_decay < math.inf:
        raise ValueError("`weight_decay` must be a finite float >= 0. Received:", weight_decay)
    if not 0 <= beta_1 < 1:
        raise ValueError("`beta_1` must be a float in [0, 1). Received:", beta_1)
    if not 0 <= beta_2 < 1:
        raise ValueError("`beta_2` must be a float in [0, 1). Received:", beta_2)
    if not 0 < epsilon < math.inf:
        raise ValueError("`epsilon` must be a finite float > 0. Received:", epsilon)
    if not 0 < abs(scale) < math.inf:
        raise ValueError("`scale` must be a finite float other than 0. Received:", scale)
    if not limit > 0:
        raise ValueError("`clipvalue` must be a finite float > 0, or None. Received:", limit)


# Inlined, so that LLVM takes the logarithms of the betas, which rarely vary, out of the loop around a step: they and
# the checks would take longer than a step of ten elements.
@njit(**INLINED)
def checked_coefficients(
    number, learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit, nesterov, is_corrected, decouple_lr
):
    """The coefficients of one update in float64, of numbers of any type, which are checked as those of `AdamW`."""
    learning_rate, weight_decay = np.float64(learning_rate), np.float64(weight_decay)
    beta_1, beta_2, epsilon = np.float64(beta_1), np.float64(beta_2), np.float64(epsilon)
    scale, limit = np.float64(scale), np.float64(limit)
    _check_step(number, learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit)
    alpha, decay, added, lead = _varying_of(
        beta_1, beta_2, epsilon, is_corrected, nesterov, decouple_lr, number, learning_rate, weight_decay, math
    )
    return Coefficients(alpha, decay, added, lead, beta_1, 1 - beta_1, beta_2, 1 - beta_2, 1.0, scale, limit, 1.0)


@jit_for_python
def _coefficients_for_python(
    number, learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit, nesterov, is_corrected, decouple_lr
):
    return checked_coefficients(
        number, learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit, nesterov, is_corrected, decouple_lr
    )


def coefficients(
    number: int,
    learning_rate: float,
    weight_decay: float = 0.004,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    clipvalue: float | None = None,
    nesterov: bool = False,
    epsilon_mode: str = "hat",
    decouple_lr: bool = False,
    scale: float = 1.0,
) -> Coefficients:
    """The numbers that `update` needs of one step.

    It can be called in Python and in compiled code for the processor.

    Parameters
    ----------
    number, learning_rate, ..., scale
        As of `step`.

    Returns
    -------
    c : Coefficients
        A named tuple of numbers in float64, which a kernel can be given as it is.

    Raises
    ------
    TypeError, ValueError
        If one is no number, or out of its range.

    Examples
    --------
    >>> coefficients(0, 0.1).alpha.__round__(6)
    0.031623
    """
    corrected = _is_corrected(epsilon_mode)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise ValueError(f"`number` must be an integer >= 0: how many steps came before. Received: {brief(number)}")
    limit = math.inf if clipvalue is None else clipvalue
    numbers = (learning_rate, weight_decay, beta_1, beta_2, epsilon, scale, limit)
    for name, value in zip(_NAMES, numbers, strict=True):
        if not isinstance(value, Real) and not (isinstance(value, np.ndarray) and value.ndim == 0):
            raise TypeError(f"`{name}` is {brief(value)} of type {type(value).__name__}; expected a number")
    found: Coefficients = _coefficients_for_python(number, *numbers, bool(nesterov), corrected, bool(decouple_lr))
    return found


_NAMES = ("learning_rate", "weight_decay", "beta_1", "beta_2", "epsilon", "scale", "clipvalue")


def _is_corrected(epsilon_mode: Any) -> bool:
    if epsilon_mode not in MODES:
        raise ValueError(f"`epsilon_mode` must be 'hat' or 'corrected'. Received: epsilon_mode={brief(epsilon_mode)}")
    return bool(epsilon_mode == "corrected")


@overload(coefficients, prefer_literal=True, jit_options=INLINED)
def _overload_coefficients(
    number,
    learning_rate,
    weight_decay=0.004,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-7,
    clipvalue=None,
    nesterov=False,
    epsilon_mode="hat",
    decouple_lr=False,
    scale=1.0,
):
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "beta_1": beta_1, "beta_2": beta_2}
    check_step(number, clipvalue, **rates, epsilon=epsilon, scale=scale)
    is_corrected, clips = literal_mode(epsilon_mode), not is_none(clipvalue)

    def compiled(
        number,
        learning_rate,
        weight_decay=0.004,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        clipvalue=None,
        nesterov=False,
        epsilon_mode="hat",
        decouple_lr=False,
        scale=1.0,
    ):
        limit = clipvalue if clips else math.inf
        return checked_coefficients(
            number,
            learning_rate,
            weight_decay,
            beta_1,
            beta_2,
            epsilon,
            scale,
            limit,
            bool(nesterov),
            is_corrected,
            bool(decouple_lr),
        )

    return compiled


# A step


def step(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    number: int,
    learning_rate: float,
    weight_decay: float = 0.004,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    velocity_hat: Any = None,
    clipvalue: float | None = None,
    nesterov: bool = False,
    epsilon_mode: str = "hat",
    decouple_lr: bool = False,
    scale: float = 1.0,
) -> None:
    """One step of AdamW, in place, for arrays of a user's compiled code: the bits of `AdamW.apply`.

    It can be called in functions of `numba.njit`, also with ``parallel=True`` (each array by one thread) and
    ``cache=True``, and in Python.

    Parameters
    ----------
    p, g, m, v : arrays of float32 or float64
        The variable, its gradient, its momentum and its velocity, all of one shape and dtype. Moments begin as zeros.
        Those that are all in C order, or all in Fortran order, are updated as vectors; others row by row.
    number : int
        How many steps came before this one: 0 at the first.
    learning_rate, weight_decay, beta_1, beta_2, epsilon, clipvalue : float
        As in `AdamW`.
    velocity_hat : array like `v`, optional
        The largest velocity so far: with it, the step is one of AMSGrad. It begins as zeros.
    nesterov, epsilon_mode, decouple_lr
        As in `AdamW`. In compiled code, `nesterov` and `epsilon_mode` have to be literals.
    scale : float, default 1
        What the gradient is multiplied with first: one over a loss scale, the factor of a clip by norm; negative to
        maximize.

    Raises
    ------
    ValueError
        If the shapes differ, two arrays share memory, or a number is out of its range; nothing is written then. (From
        the body of a parallel loop, Numba raises a SystemError that comes from it.)
    numba.core.errors.TypingError
        When a function is compiled, and in Python: if something is no array or no number, has another dtype or is
        read-only, or an option has to be a literal.

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> @numba.njit
    ... def descend(p, steps):
    ...     m, v = np.zeros_like(p), np.zeros_like(p)
    ...     for number in range(steps):
    ...         step(p, 2 * (p - 3), m, v, number, 0.1, weight_decay=0)
    ...     return p
    >>> descend(np.zeros(2), 500).round(3)
    array([3., 3.])
    """
    numbers = (number, learning_rate, weight_decay, beta_1, beta_2, epsilon)
    options = (clipvalue, nesterov, epsilon_mode, decouple_lr, scale)
    _step_for_python(
        p, g, m, v, velocity_hat, on(clipvalue is not None), on(nesterov), coefficients(*numbers, *options)
    )


@overload(step, prefer_literal=True, jit_options=INLINED)
def _overload_step(
    p,
    g,
    m,
    v,
    number,
    learning_rate,
    weight_decay=0.004,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-7,
    velocity_hat=None,
    clipvalue=None,
    nesterov=False,
    epsilon_mode="hat",
    decouple_lr=False,
    scale=1.0,
):
    check_arrays(p, g, m, v, velocity_hat)
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "beta_1": beta_1, "beta_2": beta_2}
    check_step(number, clipvalue, **rates, epsilon=epsilon, scale=scale)
    lead, limit = flag("nesterov", nesterov), on(not is_none(clipvalue))
    is_corrected = literal_mode(epsilon_mode)

    def compiled(
        p,
        g,
        m,
        v,
        number,
        learning_rate,
        weight_decay=0.004,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        velocity_hat=None,
        clipvalue=None,
        nesterov=False,
        epsilon_mode="hat",
        decouple_lr=False,
        scale=1.0,
    ):
        c = checked_coefficients(
            number,
            learning_rate,
            weight_decay,
            beta_1,
            beta_2,
            epsilon,
            scale,
            math.inf if limit is None else clipvalue,
            lead is not None,
            is_corrected,
            bool(decouple_lr),
        )
        _step(p, g, m, v, velocity_hat, limit, lead, c)

    return compiled


def _step(p, g, m, v, top, limit, lead, c):
    raise NotImplementedError


@overload(_step, jit_options=INLINED)
def _overload_one_step(p, g, m, v, top, limit, lead, c):
    check_arrays(p, g, m, v, top)
    like, amsgrad = LIKE[p.dtype.name], on(not is_none(top))
    layouts = {kind.layout for kind in (p, g, m, v, *([top] if amsgrad else []))}
    if len(layouts) == 1 and layouts <= {"C", "F"}:

        def dense(p, g, m, v, top, limit, lead, c):
            check_shapes(p, g, m, v, top)
            check_apart(p, g, m, v, top, True)
            tops = 0 if amsgrad is None else top.ctypes.data
            addresses = (p.ctypes.data, g.ctypes.data, m.ctypes.data, v.ctypes.data, tops)
            call_apart(_update_dense, (p.size, addresses, like, amsgrad, limit, lead, c))

        return dense

    update_strided = _update_row if p.ndim == 1 else _update_rows

    def strided(p, g, m, v, top, limit, lead, c):
        check_shapes(p, g, m, v, top)
        check_apart(p, g, m, v, top, False)
        call_apart(update_strided, (p, g, m, v, top, like, limit, lead, c))

    return strided


@jit_for_python
def _step_for_python(p, g, m, v, top, limit, lead, c):
    _step(p, g, m, v, top, limit, lead, c)


@jit
def _update_dense(count, addresses, like, amsgrad, limit, lead, c):
    mode = exchange_mode(mode_for(abs(c.scale)))
    c = cast_coefficients(c, 1.0, like)
    p_at, g_at, m_at, v_at, top_at = addresses
    p, g = pointer(p_at, like), pointer(g_at, like)
    m, v = pointer(m_at, like), pointer(v_at, like)
    top = None if amsgrad is None else pointer(top_at, like)
    _update_chunk(count, p, g, m, v, top, limit, lead, c)
    exchange_mode(mode)


@jit
def _update_chunk(count, p, g, m, v, top, limit, lead, c):
    clip, ahead = None if limit is None else c.limit, None if lead is None else c.lead
    update_chunk(count, p, g, m, v, top, None, None, None, clip, ahead, c)


@jit
def _update_row(p, g, m, v, top, like, limit, lead, c):
    mode = exchange_mode(mode_for(abs(c.scale)))
    _update_chunk(p.size, p, g, m, v, top, limit, lead, cast_coefficients(c, 1.0, like))
    exchange_mode(mode)


@jit
def _update_rows(p, g, m, v, top, like, limit, lead, c):
    mode = exchange_mode(mode_for(abs(c.scale)))
    c = cast_coefficients(c, 1.0, like)
    for i in np.ndindex(p.shape[:-1]):
        tops = None if top is None else top[i]
        _update_chunk(p.shape[-1], p[i], g[i], m[i], v[i], tops, limit, lead, c)
    exchange_mode(mode)
