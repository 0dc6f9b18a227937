"""The learning rate of a minimization in compiled code: a function of the iteration, and what it is given.

It becomes a C function (calls.py), whatever it was: the run (running.py) is compiled once for all of them.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core.errors import TypingError

from ..arrays.compiled import jit
from ..coefficients import MOST_STEPS
from ..minimizer import stopping
from ..minimizer.automatic import FIRST_RATE, Stages, first_stage_of
from ..schedules import PolynomialDecay
from .literals import literal, unliteral
from .stepping import EXACT

EXPECTED_RATE = "'auto', a number, an array of one rate for each iteration, or a function of numba.njit"
for_compiled_code = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **EXACT)


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


exact = njit(**EXACT)
_where = exact(lambda condition, yes, no: yes if condition else no)
_floor, _ceil = exact(lambda x: math.floor(x)), exact(lambda x: math.ceil(x))
_log, _maximum = exact(lambda x: math.log(x)), exact(lambda x, y: max(x, y))
_first_stage_of = jit(first_stage_of)
_rate_in_stages, _decayed = exact(Stages.formula), exact(PolynomialDecay.formula)


@for_compiled_code
def _automatic_rate(step, unused, given):
    stages, decay = given
    functions = _Functions(_where, _floor, _log, _maximum, _ceil)
    if stages.first_stage > 0:
        return _rate_in_stages(stages, functions, np.float64(step))
    return _decayed(decay, functions, np.float64(step))


@jit
def _automatic_data(learning_rate, limits):
    limit = min(limits[stopping.MAXITER], limits[stopping.MAXFEV])
    most = np.int64(min(limit, np.float64(MOST_STEPS)))
    stage = _first_stage_of(limit) if limit == math.inf else _first_stage_of(most)
    # The base and the power are data: LLVM would make other functions of powers that it knows, with other last bits.
    decay = _Decay(FIRST_RATE, np.float64(max(most, 1)), 0.0, 2.0, False)
    return (_Stages(np.float64(stage), 0.0, 10.0), decay), stage


@jit
def _fixed_rate(step, unused, given):
    return given


@for_compiled_code
def _rate_of_array(step, unused, given):
    return np.float64(given[step])


@jit
def _fixed_data(learning_rate, limits):
    return np.float64(learning_rate), 0


@for_compiled_code
def _array_data(learning_rate, limits):
    if learning_rate.size < limits[stopping.MAXITER]:
        raise ValueError(
            "`learning_rate` must hold a rate for each of `maxiter` iterations. Received, and maxiter:",
            learning_rate.size,
            limits[stopping.MAXITER],
        )
    return learning_rate, 0


@for_compiled_code
def _no_data(learning_rate, limits):
    return 0, 0


def rate_of(learning_rate):
    """The C function of the rates, what makes its data, and whether the rate is chosen here."""
    if isinstance(learning_rate, types.Dispatcher):
        function = learning_rate.dispatcher
        return for_compiled_code(lambda step, unused, given: np.float64(function(step))), _no_data, None
    if isinstance(learning_rate, types.Array) and learning_rate.ndim == 1:
        return _rate_of_array, _array_data, None
    if isinstance(unliteral(learning_rate), (types.Number, int, float)):
        return _fixed_rate, _fixed_data, None
    if literal("learning_rate", learning_rate, EXPECTED_RATE) == "auto":
        return _automatic_rate, _automatic_data, True
    raise TypingError(f"`learning_rate` is {learning_rate}; expected {EXPECTED_RATE}")
