"""What a minimization in compiled code is given: its objective, its start and bounds, and when to stop."""

import math

import numpy as np
from numba import carray, types
from numba.core.errors import TypingError
from numba.core.registry import cpu_target

from ..arrays.compiled import jit, pointer
from ..cpu.kernels import LIKE
from ..minimizer import stopping
from ..minimizer.objective import required_parameters
from ..minimizer.objective_kernel import value_and_gradient
from .literals import is_none, unliteral
from .rates import exact, for_compiled_code


def objective_of(fun, jac, x0, args):
    """Compiled code that takes addresses of x and of its gradient, and (args, shape); and code that raises again."""
    for name, function in (("fun", fun), ("jac", jac)):
        if not isinstance(function, types.Dispatcher) and not (name == "jac" and _is_true(function)):
            raise TypingError(
                f"`{name}` is {function}; expected a function of numba.njit{', or True' * (name == 'jac')}"
            )
    like, ndim = LIKE[dtype_of(x0).name], x0.ndim
    others = tuple(args) if isinstance(args, types.BaseTuple) else () if args == () else (args,)
    both_in_one = not isinstance(jac, types.Dispatcher)
    fills = both_in_one and required_parameters(fun.dispatcher) == 2 + len(others)
    _check_returned(fun, jac, fills, types.Array(dtype_of(x0), ndim, "C"), others)
    both = value_and_gradient(fun.dispatcher, True if both_in_one else jac.dispatcher, fills, ndim)

    @for_compiled_code
    def evaluated(x_at, g_at, data):
        args, shape = data
        return np.float64(both(carray(pointer(x_at, like), shape), carray(pointer(g_at, like), shape), args))

    @for_compiled_code
    def again(x, data):
        args, shape = data
        both(x.reshape(shape), np.zeros_like(x).reshape(shape), args)
        raise RuntimeError("`fun` raised an exception, but not when it was called again with the same `x`")

    return evaluated, again


def _check_returned(fun, jac, fills, x, others):
    """Refuse an objective whose result is not what was expected, in words of our own."""

    def returned(function, *arguments):
        return function.get_call_type(cpu_target.typing_context, arguments, {}).return_type

    def is_like_x(kind):
        return isinstance(kind, types.Array) and kind.ndim == x.ndim and isinstance(kind.dtype, types.Float)

    value = unliteral(returned(fun, x, *([x] if fills else []), *others))
    if not fills and not isinstance(jac, types.Dispatcher):
        if not isinstance(value, types.BaseTuple) or len(value) != 2 or not is_like_x(value[1]):
            raise TypingError(f"`fun` returns {value}; expected (value, gradient), a gradient like {x}")
        value = value[0]
    elif not fills and not is_like_x(gradient := returned(jac, x, *others)):
        raise TypingError(f"`jac` returns {gradient}; expected a gradient like {x}")
    if fills and isinstance(value, types.BaseTuple):
        raise TypingError(
            f"`fun` returns {value}; expected its value alone, since it takes {2 + len(others)} arguments, `args` has "
            f"{len(others)}, and so its second one is taken for the gradient that it fills"
        )
    if not isinstance(value, (types.Float, types.Integer)):
        raise TypingError(f"`fun` returns {value} as its value; expected a number")


def _is_true(kind):
    return kind is True or getattr(kind, "literal_value", getattr(kind, "value", False)) is True


@exact
def itself(args):
    return args


@exact
def alone(args):
    return (args,)


# The start, its bounds, and when to stop


def check_start(x0):
    known = isinstance(x0, types.Array) and (
        x0.dtype in (types.float32, types.float64) or isinstance(x0.dtype, types.Integer)
    )
    if not known or x0.ndim == 0:
        raise TypingError(f"`x0` is {x0}; expected an array of float32 or float64 with at least one dimension")


def dtype_of(x0):
    return x0.dtype if x0.dtype == types.float32 else types.float64


@jit
def flat_copy(x0, like):
    """A vector in C order, of floats."""
    if x0.size == 0:
        raise ValueError("`x0` is empty; expected at least one element")
    x = np.empty(x0.size, type(like))
    for i, value in enumerate(x0.flat):
        if not math.isfinite(value):
            raise ValueError("`x0` must hold finite numbers. Received, at element:", value, i)
        x[i] = value
    return x


def bound_of(name, kind, x0):
    """What makes a vector of float64 of a bound."""
    if is_none(kind):
        return _no_bound
    if isinstance(unliteral(kind), (types.Integer, types.Float, int, float)):
        return _one_bound
    if isinstance(kind, types.Array) and kind.ndim == x0.ndim:
        return _each_bound
    raise TypingError(f"`{name}` is {kind}; expected a number or an array like `x0`, which has {x0.ndim} dimensions")


@jit
def _no_bound(bound, x0, infinity):
    return np.full(x0.size, infinity)


@jit
def _one_bound(bound, x0, infinity):
    return np.full(x0.size, np.float64(bound))


@jit
def _each_bound(bound, x0, infinity):
    if bound.shape != x0.shape:
        raise ValueError("`lower` and `upper` must have the shape of `x0`. Received:", bound.shape, x0.shape)
    result = np.empty(x0.size)
    for i, value in enumerate(bound.flat):
        result[i] = value
    return result


@jit
def unbounded(lower, upper, x):
    return None, None


@jit
def bounded(lower, upper, x):
    """The bounds in the dtype of `x`, rounded inward as in minimizer/bounds.py; `x` is moved within them."""
    least, most = np.empty_like(x), np.empty_like(x)
    infinity = x.dtype.type(np.inf)
    for i in range(x.size):
        if not lower[i] <= upper[i]:
            raise ValueError("`lower` must be <= `upper`. Received, at element:", lower[i], upper[i], i)
        low, high = x.dtype.type(lower[i]), x.dtype.type(upper[i])
        if lower[i] < upper[i]:
            low = np.nextafter(low, infinity) if low < lower[i] else low
            high = np.nextafter(high, -infinity) if high > upper[i] else high
            if low > high:  # no number of the dtype lies between them
                low, high = x.dtype.type(lower[i]), x.dtype.type(upper[i])
        if low == infinity or high == -infinity:
            raise ValueError("`lower` and `upper` are beyond the range of `x0`. Received:", lower[i], upper[i], i)
        least[i], most[i] = low, high
        value = low if x[i] < low else x[i]
        x[i] = high if value > high else value
    return least, most


@jit
def value_or(value, otherwise):
    return otherwise if value is None else np.float64(value)


@jit
def limits_of(gtol, ftol, xtol, patience, maxiter, maxfev):
    """As stopping.limits_of; None is off."""
    limits = np.empty(stopping.HOW_MANY_LIMITS)
    limits[stopping.GTOL], limits[stopping.FTOL], limits[stopping.XTOL] = gtol, ftol, xtol
    limits[stopping.PATIENCE], limits[stopping.MAXITER], limits[stopping.MAXFEV] = patience, maxiter, maxfev
    limits[stopping.STOP_AT_NONFINITE] = 1
    for tolerance in limits[:3]:
        if not (tolerance >= 0 or tolerance == -math.inf):
            raise ValueError("`gtol`, `ftol` and `xtol` must be floats >= 0, or None. Received:", tolerance)
    if not (patience >= 1 and patience == np.floor(patience)):
        raise ValueError("`patience` must be an integer >= 1, or None. Received:", patience)
    if not (maxiter >= 0 and maxiter == np.floor(maxiter)):
        raise ValueError("`maxiter` must be an integer >= 0. Received:", maxiter)
    if not (maxfev >= 1 and maxfev == np.floor(maxfev)):
        raise ValueError("`maxfev` must be an integer >= 1, or None. Received:", maxfev)
    return limits
