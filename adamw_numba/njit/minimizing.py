"""`minimize` for users' own compiled code: the run of running.py around an objective of theirs."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import overload

from ..arrays.compiled import jit, pointer
from ..cpu.kernels import LIKE, on
from ..minimizer import stopping
from ..minimizer.automatic import FIRST_RATE, Stages, first_stage_of
from ..minimizer.objective import required_parameters
from ..minimizer.objective_kernel import value_and_gradient
from ..schedules import PolynomialDecay
from .calls import as_c_function
from .running import FUN_RAISED, MOST_ROWS, RATE_RAISED, Numbers, Ways, run
from .stepping import EXACT, MODES, checked_coefficients, flag, is_none, literal, literal_mode

EXPECTED_RATE = "'auto', a number, an array of one rate for each iteration, or a function of numba.njit"
_for_compiled_code = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **EXACT)


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


# The learning rate: a C function of the step (see calls.py), and what it is given


class _Stages(NamedTuple):
    """As `self` of the formula of `Stages`."""

    first_stage: Any
    start: Any
    base: Any


class _Decay(NamedTuple):
    """As `self` of the formula of `PolynomialDecay`."""

    initial_learning_rate: Any
    decay_steps: Any
    end_learning_rate: Any
    power: Any
    cycle: Any


class _Functions(NamedTuple):
    """The namespace of these formulas."""

    where: Any
    floor: Any
    log: Any
    maximum: Any
    ceil: Any


_exact = njit(**EXACT)
_where = _exact(lambda condition, yes, no: yes if condition else no)
_floor, _ceil = _exact(lambda x: math.floor(x)), _exact(lambda x: math.ceil(x))
_log, _maximum = _exact(lambda x: math.log(x)), _exact(lambda x, y: max(x, y))
_first_stage_of = jit(first_stage_of)
_rate_in_stages, _decayed = _exact(Stages.formula), _exact(PolynomialDecay.formula)


@_for_compiled_code
def _automatic_rate(step, unused, given):
    stages, decay = given
    functions = _Functions(_where, _floor, _log, _maximum, _ceil)
    if stages.first_stage > 0:
        return _rate_in_stages(stages, functions, np.float64(step))
    return _decayed(decay, functions, np.float64(step))


@_for_compiled_code
def _automatic_data(learning_rate, limits):
    most = np.int64(min(limits[stopping.MAXITER], limits[stopping.MAXFEV]))
    stage = _first_stage_of(most)
    # The base and the power are data: LLVM would make other functions of powers that it knows, with other last bits.
    decay = _Decay(FIRST_RATE, np.float64(max(most, 1)), 0.0, 2.0, False)
    return (_Stages(np.float64(stage), 0.0, 10.0), decay), stage


@_for_compiled_code
def _fixed_rate(step, unused, given):
    return given


@_for_compiled_code
def _rate_of_array(step, unused, given):
    return np.float64(given[step])


@_for_compiled_code
def _fixed_data(learning_rate, limits):
    return np.float64(learning_rate), 0


@_for_compiled_code
def _array_data(learning_rate, limits):
    if learning_rate.size < limits[stopping.MAXITER]:
        raise ValueError(
            "`learning_rate` must hold a rate for each of `maxiter` iterations. Received, and maxiter:",
            learning_rate.size,
            limits[stopping.MAXITER],
        )
    return learning_rate, 0


@_for_compiled_code
def _no_data(learning_rate, limits):
    return 0, 0


def _rate_of(learning_rate):
    """The C function of the rates, what makes its data, and whether the rate is chosen here."""
    if isinstance(learning_rate, types.Dispatcher):
        function = learning_rate.dispatcher
        return _for_compiled_code(lambda step, unused, given: np.float64(function(step))), _no_data, None
    if isinstance(learning_rate, types.Array) and learning_rate.ndim == 1:
        return _rate_of_array, _array_data, None
    if isinstance(unliteral(learning_rate), (types.Number, int, float)):
        return _fixed_rate, _fixed_data, None
    if literal("learning_rate", learning_rate, EXPECTED_RATE) == "auto":
        return _automatic_rate, _automatic_data, True
    raise TypingError(f"`learning_rate` is {learning_rate}; expected {EXPECTED_RATE}")


# The objective


def _objective(fun, jac, x0, args):
    """Compiled code that takes addresses of x and its gradient and (args, shape); and one that raises what it raised."""
    for name, function in (("fun", fun), ("jac", jac)):
        if not isinstance(function, types.Dispatcher) and not (name == "jac" and _is_true(function)):
            raise TypingError(
                f"`{name}` is {function}; expected a function of numba.njit{', or True' * (name == 'jac')}"
            )
    like, ndim = LIKE[_dtype_of(x0).name], x0.ndim
    others = tuple(args) if isinstance(args, types.BaseTuple) else () if args == () else (args,)
    both_in_one = not isinstance(jac, types.Dispatcher)
    fills = both_in_one and required_parameters(fun.dispatcher) == 2 + len(others)
    _check_returned(fun, jac, fills, types.Array(_dtype_of(x0), ndim, "C"), others)
    both = value_and_gradient(fun.dispatcher, True if both_in_one else jac.dispatcher, fills, ndim)

    @_for_compiled_code
    def evaluated(x_at, g_at, data):
        args, shape = data
        return np.float64(both(carray(pointer(x_at, like), shape), carray(pointer(g_at, like), shape), args))

    @_for_compiled_code
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
    if not isinstance(value, (types.Float, types.Integer)):
        raise TypingError(f"`fun` returns {value} as its value; expected a number")


def _is_true(kind):
    return kind is True or getattr(kind, "literal_value", getattr(kind, "value", False)) is True


def unliteral(kind):
    """The type of an argument, or the value that it has by default."""
    return (
        kind.value
        if isinstance(kind, types.Omitted)
        else types.unliteral(kind)
        if isinstance(kind, types.Type)
        else kind
    )


@_exact
def _itself(args):
    return args


@_exact
def _alone(args):
    return (args,)


# The start, its bounds, and when to stop


def _check_start(x0):
    known = isinstance(x0, types.Array) and (
        x0.dtype in (types.float32, types.float64) or isinstance(x0.dtype, types.Integer)
    )
    if not known or x0.ndim == 0:
        raise TypingError(f"`x0` is {x0}; expected an array of float32 or float64 with at least one dimension")


def _dtype_of(x0):
    return x0.dtype if x0.dtype == types.float32 else types.float64


@jit
def _flat_copy(x0, like):
    """A vector in C order, of floats."""
    if x0.size == 0:
        raise ValueError("`x0` is empty; expected at least one element")
    x = np.empty(x0.size, type(like))
    i = 0
    for value in x0.flat:
        if not math.isfinite(value):
            raise ValueError("`x0` must hold finite numbers. Received, at element:", value, i)
        x[i] = value
        i += 1
    return x


def _bounds_of(name, kind, x0, x0_name="x0"):
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
    i = 0
    for value in bound.flat:
        result[i] = value
        i += 1
    return result


@jit
def _unbounded(lower, upper, x):
    return None, None


@jit
def _bounded(lower, upper, x):
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


@_exact
def _or(value, otherwise):
    return otherwise if value is None else np.float64(value)


@jit
def _limits(gtol, ftol, xtol, patience, maxiter, maxfev):
    """As stopping.limits_of; None is off."""
    limits = np.empty(stopping.HOW_MANY_LIMITS)
    limits[stopping.GTOL], limits[stopping.FTOL], limits[stopping.XTOL] = gtol, ftol, xtol
    limits[stopping.PATIENCE], limits[stopping.MAXITER], limits[stopping.MAXFEV] = patience, maxiter, maxfev
    limits[stopping.STOP_AT_NONFINITE] = 1
    for tolerance in limits[:3]:
        if not (tolerance >= 0 or tolerance == -1):
            raise ValueError("`gtol`, `ftol` and `xtol` must be floats >= 0, or None. Received:", tolerance)
    if not patience >= 1:
        raise ValueError("`patience` must be an integer >= 1, or None. Received:", patience)
    if not maxiter >= 0:
        raise ValueError("`maxiter` must be an integer >= 0. Received:", maxiter)
    if not maxfev >= 1:
        raise ValueError("`maxfev` must be an integer >= 1, or None. Received:", maxfev)
    return limits


# The doors


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
    """Minimize a compiled function inside compiled code: the bits of `adamw_numba.minimize`, without Python."""
    if epsilon_mode not in MODES:
        raise ValueError(epsilon_mode)
    x0 = np.asarray(x0)
    door = _door(bool(amsgrad), bool(nesterov), epsilon_mode, isinstance(learning_rate, str))
    rest = (maxiter, lower, upper, gtol, ftol, xtol, patience, maxfev, weight_decay, beta_1, beta_2, epsilon)
    return door(fun, x0, args, learning_rate, jac, *rest, clipvalue, decouple_lr)


@overload(minimize, prefer_literal=True, jit_options=EXACT)
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
    _check_start(x0)
    like = LIKE[_dtype_of(x0).name]
    evaluated, raise_again = _objective(fun, jac, x0, args)
    rate_at, rate_data, automatic = _rate_of(learning_rate)
    top, lead, limit = flag("amsgrad", amsgrad), flag("nesterov", nesterov), on(not is_none(clipvalue))
    is_corrected = literal_mode(epsilon_mode)
    lowest, highest = _bounds_of("lower", lower, x0), _bounds_of("upper", upper, x0)
    bounded = _unbounded if is_none(lower) and is_none(upper) else _bounded
    tuple_of = _itself if isinstance(args, types.BaseTuple) or args == () else _alone
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
        limits = _limits(
            _or(gtol, -1.0),
            _or(ftol, -1.0),
            _or(xtol, -1.0),
            _or(patience, math.inf),
            np.float64(maxiter),
            _or(maxfev, math.inf),
        )
        second = _or(beta_2, usual_beta_2)
        # Checked, with a learning rate of 0 in the place of all.
        checked_coefficients(
            0,
            0.0,
            weight_decay,
            beta_1,
            second,
            epsilon,
            1.0,
            _or(clipvalue, math.inf),
            lead is not None,
            is_corrected,
            bool(decouple_lr),
        )
        x = _flat_copy(x0, like)
        least, most = bounded(lowest(lower, x0, -math.inf), highest(upper, x0, math.inf), x)
        given, stage = rate_data(learning_rate, limits)
        data = (tuple_of(args), x0.shape)
        evaluate, words = as_c_function(evaluated, data)
        rate, rate_words = as_c_function(rate_at, given)
        numbers = Numbers(
            np.float64(weight_decay),
            np.float64(beta_1),
            second,
            np.float64(epsilon),
            _or(clipvalue, math.inf),
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
def _door(amsgrad, nesterov, epsilon_mode, is_automatic):
    """`minimize` for Python, with flags that are literals."""

    @njit
    def door(
        fun, x0, args, learning_rate, jac, maxiter, lower, upper, gtol, ftol, xtol, patience, maxfev, weight_decay,
        beta_1, beta_2, epsilon, clipvalue, decouple_lr
    ):  # fmt: skip
        rate = "auto" if is_automatic else learning_rate
        return minimize(
            fun, x0, args, rate, maxiter, True if jac is None else jac, lower, upper, gtol, ftol, xtol, patience,
            maxfev, weight_decay, beta_1, beta_2, epsilon, clipvalue, amsgrad, nesterov, epsilon_mode, decouple_lr
        )  # fmt: skip

    return door
