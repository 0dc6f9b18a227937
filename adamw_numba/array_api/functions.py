"""The target for every other array library: `update` bound by whole-array functions of the Array API, in new arrays."""

from functools import cache
from typing import Any

import numpy as np

from ..arrays import COMPUTE, SLOT, Array, dtype_name, is_complex, namespace
from ..update import Coefficients, accumulate, blend, make_update

Slots = dict[str, Array]
_ORDER = ("momentum", "velocity", "velocity_hat", "average", "gradient_accumulator")


# NumPy-backed libraries warn of infinities and NaN, which here are for `nonfinite` to deal with.
_quiet = np.errstate(all="ignore")


@cache
def _update_of(xp: Any) -> Any:
    return make_update(xp.sqrt, xp.maximum, xp.minimum)


@_quiet
def updated(
    p: Array, g: Array, slots: Slots, c: Coefficients, clipvalue: float | None, nesterov: bool, overwrite: Any
) -> tuple[Array, Slots]:
    """The new variable and the new slots after one update; nothing given is changed.

    `slots` holds the arrays to use, `overwrite` says whether the variable becomes its average: a bool, or a scalar
    array under a trace.
    """
    xp = namespace(p)
    value = _value(xp, p, slots.get("master"))
    arguments = [value, _cast(xp, g, p), *(slots.get(name) for name in _ORDER)]
    results = []
    for part in (xp.real, xp.imag) if is_complex(p) else (None,):
        parts = [x if part is None or x is None else part(x) for x in arguments]
        limit = None if clipvalue is None else xp.full_like(parts[0], clipvalue)
        own = _coefficients(xp, c, parts[0])
        results.append(_update_of(xp)(*parts, limit, own.lead if nesterov else None, own))
    new = [_join(xp, parts, value) for parts in zip(*results, strict=True)]
    state = {name: array for name, array in zip(_ORDER, new[1:], strict=False) if array is not None}
    if "gradient_accumulator" in slots:
        state["gradient_accumulator"] = xp.zeros_like(slots["gradient_accumulator"])
    return _stored(xp, p, new[0], slots | state, overwrite)


@_quiet
def blended(p: Array, slots: Slots, c: Coefficients, overwrite: Any) -> tuple[Array, Slots]:
    """The same for a variable that has no gradient: only its average moves."""
    if "average" not in slots:
        return p, slots
    xp = namespace(p)
    value = _value(xp, p, slots.get("master"))
    real = xp.real(value) if is_complex(p) else value
    average = blend(slots["average"], value, _coefficients(xp, c, real))
    return _stored(xp, p, value, slots | {"average": average}, overwrite)


@_quiet
def accumulated(total: Array, g: Array, c: Coefficients) -> Array:
    """The accumulator after one more micro-step."""
    xp = namespace(total)
    return accumulate(total, _cast(xp, g, total), _coefficients(xp, c, xp.real(total) if is_complex(total) else total))


@_quiet
def norm(g: Array, total: Array | None, c: Coefficients) -> Array:
    """The norm of a gradient (with what was accumulated, if given), safe from overflow; a scalar array."""
    x = g if total is None else accumulated(total, g, c)
    xp = namespace(x)
    x = _cast(xp, x, x)
    x = xp.abs(x)
    if dtype_name(x) == "float32" and "float64" in xp.__array_namespace_info__().dtypes():
        x = xp.astype(x, xp.float64)
    if 0 in x.shape:
        return xp.sum(x)
    return root_of_squares(xp, xp.max(x), lambda unit: xp.sum((x / unit) ** 2))


def root_of_squares(xp: Any, peak: Array, sum_of_squares: Any) -> Array:
    """A norm by its largest element `peak`: not finite only if that is not."""
    finite = xp.isfinite(peak)
    unit = xp.where((peak > 0) & finite, peak, xp.ones_like(peak))
    total = unit * xp.sqrt(sum_of_squares(unit))
    largest = xp.ones_like(peak) * xp.finfo(peak.dtype).max
    return xp.where(finite & (total > largest), largest, total)


def _cast(xp: Any, x: Array, like: Array) -> Array:
    return xp.astype(x, getattr(xp, SLOT[dtype_name(like)]))


def _value(xp: Any, p: Array, master: Array | None) -> Array:
    """A variable's number: its float32 master, unless its owner has written the variable since."""
    value = _cast(xp, p, p)
    return value if master is None else xp.where(xp.astype(master, p.dtype) == p, master, value)


def _stored(xp: Any, p: Array, value: Array, slots: Slots, overwrite: Any) -> tuple[Array, Slots]:
    if "average" in slots:
        value = select(overwrite, slots["average"], value)
    if "master" in slots:
        slots = slots | {"master": value}
    return xp.astype(value, p.dtype), slots


def select(condition: Any, yes: Array, no: Array) -> Array:
    """One of two arrays, by a bool or by a scalar array under a trace."""
    if isinstance(condition, bool):
        return yes if condition else no
    return namespace(yes).where(condition, yes, no)


def _coefficients(xp: Any, c: Coefficients, real: Array) -> Coefficients:
    """Python floats take an array's dtype by themselves; scalar arrays are cast to it."""
    dtype = getattr(xp, COMPUTE[dtype_name(real)])
    return Coefficients(*(k if isinstance(k, (int, float)) else xp.astype(k, dtype) for k in c))


def _join(xp: Any, parts: tuple[Any, ...], like: Array) -> Array | None:
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    real, imaginary = (xp.astype(part, like.dtype) for part in parts)
    return real + imaginary * 1j
