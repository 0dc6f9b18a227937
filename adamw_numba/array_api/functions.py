"""The target for every other array library: `update` bound by whole-array functions of the Array API, in new arrays."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..arrays import COMPUTE, SLOT, Array, dtype_name, is_complex, namespace
from ..update import Coefficients, accumulate, blend, make_update

Slots = dict[str, Array]
_ORDER = ("momentum", "velocity", "velocity_hat", "average", "gradient_accumulator")


# NumPy-backed libraries warn of infinities and NaN, which here are for `nonfinite` to deal with.
_quiet = np.errstate(all="ignore")


class Corrected(NamedTuple):
    """What optax does with the second moment once it is corrected, which the formula's own is not."""

    correction: Any  # 1 - beta_2^t
    eps_root: Any  # added under the root


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
    new, state = _one_update(xp, value, _cast(xp, g, p), slots, c, clipvalue, nesterov, None)
    return _stored(xp, p, new, state, overwrite)


@_quiet
def change(
    p: Array,
    g: Array,
    slots: Slots,
    c: Coefficients,
    clipvalue: float | None,
    nesterov: bool,
    overwrite: Any,
    corrected: Corrected,
) -> tuple[Array, Slots]:
    """What one update adds to a variable, which has no master copy, and the new slots; by the conventions of optax.

    It is not ``new - old``, which beside a large variable has lost most of a small step: the formula at 0 is the step
    of Adam, and the decay is a term of its own.
    """
    xp = namespace(p)
    value = _cast(xp, p, p)
    others = {name: array for name, array in slots.items() if name != "average"}
    moved, state = _one_update(xp, 0.0, _cast(xp, g, p), others, c, clipvalue, nesterov, corrected)
    own = _coefficients(xp, c, xp.real(value) if is_complex(p) else value)
    moved = moved - value * own.decay
    if "average" in slots:
        state["average"] = blend(slots["average"], value + moved, own)
        moved = select(overwrite, state["average"] - value, moved)
    return moved, state


def _one_update(
    xp: Any,
    p: Array | float,
    g: Array,
    slots: Slots,
    c: Coefficients,
    clipvalue: float | None,
    nesterov: bool,
    corrected: Corrected | None,
) -> tuple[Array, Slots]:
    """The formula, for real and imaginary parts by themselves: the new variable, and all slots."""
    arguments = [p, g, *(slots.get(name) for name in _ORDER)]
    results = []
    for part in (xp.real, xp.imag) if is_complex(g) else (None,):
        parts = [x if part is None or isinstance(x, float | None) else part(x) for x in arguments]
        limit = None if clipvalue is None else xp.full_like(parts[1], clipvalue)
        own = _coefficients(xp, c, parts[1])
        lead = own.lead if nesterov else None
        if corrected is None:
            results.append(_update_of(xp)(*parts, limit, lead, own))
        else:
            results.append(_corrected_update(xp, parts, limit, lead, own, corrected))
    new = [_join(xp, parts, g) for parts in zip(*results, strict=True)]
    state = {name: array for name, array in zip(_ORDER, new[1:], strict=False) if array is not None}
    if "gradient_accumulator" in slots:
        state["gradient_accumulator"] = xp.zeros_like(slots["gradient_accumulator"])
    return new[0], slots | state


def _corrected_update(
    xp: Any, parts: list[Any], limit: Array | None, lead: Any, c: Coefficients, corrected: Corrected
) -> tuple[Any, ...]:
    """The formula where a constant lies under the root, and AMSGrad keeps the maximum of corrected second moments."""
    p, g, m, v, top, *rest = parts
    correction, eps_root = (k if isinstance(k, float) else xp.astype(k, g.dtype) for k in corrected)
    update = _update_of(xp)
    if not isinstance(eps_root, float) or eps_root:
        update = make_update(lambda second: xp.sqrt(second + eps_root * correction), xp.maximum, xp.minimum)
    highest = None if top is None else top * correction
    new_p, m, v, highest, average = update(p, g, m, v, highest, *rest, limit, lead, c)
    # Not `highest / correction`: a maximum that stays must not drift by roundings.
    return new_p, m, v, None if top is None else xp.maximum(top, v / correction), average


def no_change(p: Array) -> Array:
    """The change of a variable that stays as it is."""
    xp = namespace(p)
    return xp.zeros_like(_cast(xp, p, p))


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
