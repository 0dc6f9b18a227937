"""When a minimization stops: one set of rules, run as they stand and, for the compiled loop, compiled by Numba.

What is known is kept in arrays, by the indices below: compiled code reads and writes them, and a checkpoint holds them.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import namespace

# What is known of the last evaluation, in float64; REFERENCE is the value that `patience` compares with.
FUN, GRADIENT_NORM, STEP_NORM, SIZE, PREVIOUS, BEST, REFERENCE, HOW_MANY_VALUES = range(8)
# What is counted, in int64. EVALUATED is 0 where the arrays have moved since the last evaluation. UPDATED is 1 where an
# update with a rate above 0 came before it, which is not so while gradients accumulate: nothing has moved then, and
# this must not count as convergence. COST is how many evaluations the last iteration took.
NIT, NFEV, NJEV, COST, BEST_AT, STALE, FLAT, STILL, REASON, EVALUATED, UPDATED, HOW_MANY_COUNTS = range(12)
# What is allowed, in float64: infinity for no limit, -1 for a tolerance that is off.
GTOL, FTOL, XTOL, PATIENCE, MAXITER, MAXFEV, STOP_AT_NONFINITE, HOW_MANY_LIMITS = range(8)

_ONE_WAY = 0.7  # of the size of the gradients; where they only go up and down, the average is a quarter of it
IN_A_ROW = 10  # iterations: Adam's losses go up and down, and are nearly flat at each turn

GOING_ON, GRADIENT, FUNCTION, STEP, NO_PROGRESS, ITERATIONS, EVALUATIONS, TIME, NONFINITE, CALLBACK, INTERRUPTED = (
    range(11)
)
STATUS = {
    GRADIENT: (0, "Optimization terminated successfully: the gradient is within `gtol`."),
    FUNCTION: (0, "Optimization terminated successfully: the function changes by no more than `ftol`."),
    STEP: (0, "Optimization terminated successfully: the steps are within `xtol`."),
    NO_PROGRESS: (0, "Optimization terminated successfully: no improvement within `patience` iterations."),
    ITERATIONS: (1, "Maximum number of iterations has been exceeded."),
    EVALUATIONS: (2, "Maximum number of function evaluations has been exceeded."),
    TIME: (2, "Maximum time has been exceeded."),
    NONFINITE: (3, "NaN or infinity encountered in the function or its gradient."),
    CALLBACK: (99, "`callback` raised `StopIteration`."),
    INTERRUPTED: (130, "Interrupted by a signal; the state is saved."),
}


def limits_of(settings: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The limits that the options ask for."""
    limits = np.empty(HOW_MANY_LIMITS)
    for index, key in ((GTOL, "gtol"), (FTOL, "ftol"), (XTOL, "xtol")):
        limits[index] = -1 if settings[key] is None else settings[key]
    for index, key in ((PATIENCE, "patience"), (MAXITER, "maxiter"), (MAXFEV, "maxfev")):
        limits[index] = math.inf if settings[key] is None else min(settings[key], sys.maxsize)
    limits[STOP_AT_NONFINITE] = settings["nonfinite"] == "stop"
    return limits


def sums_of(each: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The sums of AdamW's squared averages of gradients, and of its averages of squared gradients."""
    square = total = 0.0
    for slots in each:
        xp = namespace(slots["momentum"])
        square += float(xp.sum(slots["momentum"] ** 2))
        total += float(xp.sum(slots["velocity"]))
    return square, total


def is_one_way(square: float, total: float, optimizer: Any) -> bool:
    """Whether the last steps went in one direction: Adam's average of gradients is then as large as they are."""
    steps = max(optimizer.iterations, 1)
    first, second = (1 - beta**steps for beta in (optimizer.beta_1, optimizer.beta_2))
    return bool(square * second > _ONE_WAY**2 * total * first**2 > 0)


def note(values: Any, counts: Any, limits: Any) -> None:
    """Count what the last evaluation means for the tolerances; `BEST_AT` is its iteration if it is the best so far."""
    f, last, reference = float(values[FUN]), float(values[PREVIOUS]), float(values[REFERENCE])
    finite = math.isfinite(f) and math.isfinite(values[GRADIENT_NORM])
    if finite and f < values[BEST]:
        values[BEST] = f
        counts[BEST_AT] = counts[NIT]
    flat = abs(f - last) <= float(limits[FTOL]) * max(abs(f), abs(last), 1.0)
    still = values[STEP_NORM] <= limits[XTOL] * (limits[XTOL] + values[SIZE])
    if counts[UPDATED] != 0:
        counts[FLAT] = counts[FLAT] + 1 if flat else 0
        counts[STILL] = counts[STILL] + 1 if still and limits[XTOL] >= 0 else 0
    least = max(float(limits[FTOL]), 0.0) * max(abs(reference), 1.0)
    if finite and (reference == math.inf or f < reference - least):
        values[REFERENCE] = f
        counts[STALE] = 0
    elif counts[UPDATED] != 0:
        counts[STALE] += 1
    values[PREVIOUS] = f


def verdict(values: Any, counts: Any, limits: Any) -> Any:
    """Why to stop, or `GOING_ON`."""
    finite = math.isfinite(values[FUN]) and math.isfinite(values[GRADIENT_NORM])
    if limits[STOP_AT_NONFINITE] and not finite:
        return NONFINITE
    if finite and values[GRADIENT_NORM] <= limits[GTOL]:
        return GRADIENT
    if finite and counts[FLAT] >= IN_A_ROW:
        return FUNCTION
    if finite and counts[STILL] >= IN_A_ROW:
        return STEP
    if finite and counts[STALE] >= limits[PATIENCE]:
        return NO_PROGRESS
    if counts[NIT] >= limits[MAXITER]:
        return ITERATIONS
    if counts[NFEV] + counts[COST] > limits[MAXFEV]:
        return EVALUATIONS
    return GOING_ON
