"""The target for every other array library: `update` bound by whole-array functions of the Array API, in new arrays."""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ..arrays import COMPUTE, SLOT, Array, dtype_name, is_complex, namespace
from ..update import Coefficients, accumulate, blend, make_update, plain_muladd
from . import moments
from .masters import put_value, value_of

Slots = dict[str, Array]
_LEAST_LIMIT = 1e-12  # of norms that cannot be wrong because the squares of float32 have underflowed
_ORDER = ("momentum", "velocity", "velocity_hat", "average", "gradient_accumulator")


# NumPy-backed libraries warn of infinities and NaN, which here are for `nonfinite` to deal with.
_quiet = np.errstate(all="ignore")


class Corrected(NamedTuple):
    """What optax does with the second moment once it is corrected, which the formula's own is not."""

    correction: Any  # 1 - beta_2^t
    eps_root: Any  # added under the root


@cache
def _update_of(xp: Any) -> Any:
    return make_update(xp.sqrt, xp.maximum, xp.minimum, plain_muladd)


@_quiet
def updated(
    p: Array,
    g: Array,
    slots: Slots,
    c: Coefficients,
    clipvalue: float | None,
    nesterov: bool,
    overwrite: Any,
    noise: Any = None,
) -> tuple[Array, Slots]:
    """The new variable and the new slots after one update; nothing given is changed.

    `slots` holds the arrays to use, `overwrite` says whether the variable becomes its average: a bool, or a scalar
    array under a trace. By `noise`, moments of fewer bits are rounded.
    """
    xp = namespace(p)
    value, g = value_of(xp, p, slots.get("master")), _cast(xp, g, p)
    new, state = _one_update(xp, value, g, moments.brought_in(p, slots), c, clipvalue, nesterov, None)
    return _stored(xp, p, new, _rounded(xp, p, g, slots, state, c, clipvalue, noise), overwrite)


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
    noise: Any = None,
) -> tuple[Array, Slots]:
    """What one update adds to a variable, which has no master copy, and the new slots; by the conventions of optax.

    It is not ``new - old``, which beside a large variable has lost most of a small step: the formula at 0 is the step
    of Adam, and the decay is a term of its own.
    """
    xp = namespace(p)
    value, g = _cast(xp, p, p), _cast(xp, g, p)
    others = {name: array for name, array in slots.items() if name != "average"}
    wide = moments.brought_in(p, others)
    moved, state = _one_update(xp, 0.0, g, wide, c, clipvalue, nesterov, corrected)
    state = _rounded(xp, p, g, others, state, c, clipvalue, noise)
    own = _coefficients(xp, c, xp.real(value) if is_complex(p) else value)
    moved = moved - value * own.decay
    if "average" in slots:
        state["average"] = blend(slots["average"], value + moved, own)
        moved = select(overwrite, state["average"] - value, moved)
    return moved, state


def _rounded(
    xp: Any, p: Array, g: Array, before: Slots, after: Slots, c: Coefficients, clipvalue: float | None, noise: Any
) -> Slots:
    """The slots after an update as they are kept: rounded by the noise, where moments have fewer bits."""
    if noise is None:
        return after

    def bounds(g: Array, m: Array, v: Array, total: Array | None) -> tuple[Any, Any]:
        limit = None if clipvalue is None else xp.full_like(g, clipvalue)
        own = _coefficients(xp, c, g)
        _, m, v, _, _ = _update_of(xp)(xp.zeros_like(g), g, m, v, None, None, total, limit, None, own)
        return m, v

    return moments.rounded(p, g, before, after, noise, bounds, c)


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
        update = _update_of(xp) if corrected is None else _corrected_update(xp, parts[4], parts[1], corrected)
        results.append(update(*parts, limit, lead, own))
    new = [_join(xp, parts, g) for parts in zip(*results, strict=True)]
    state = {name: array for name, array in zip(_ORDER, new[1:], strict=False) if array is not None}
    if "gradient_accumulator" in slots:
        state["gradient_accumulator"] = xp.zeros_like(slots["gradient_accumulator"])
    return new[0], slots | state


def _corrected_update(xp: Any, top: Array | None, g: Array, corrected: Corrected) -> Any:
    """The formula where a constant lies under the root, and AMSGrad keeps the maximum of corrected second moments."""
    correction, eps_root = (k if isinstance(k, float) else xp.astype(k, g.dtype) for k in corrected)
    is_zero = isinstance(eps_root, float) and not eps_root
    if top is None and is_zero:
        return _update_of(xp)

    def maximum(x: Array, y: Array) -> Any:
        return xp.maximum(x, y / correction if x is top else y)  # the other maximum is that of a clip

    def sqrt(second: Array) -> Any:
        if top is not None:  # else it has to be corrected, and what is added to it must not be
            return xp.sqrt((second if is_zero else second + eps_root) * correction)
        return xp.sqrt(second + eps_root * correction)

    return make_update(sqrt, maximum, xp.minimum, plain_muladd)


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
    value = value_of(xp, p, slots.get("master"))
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
    return _norm(g if total is None else accumulated(total, g, c))


@_quiet
def norms(arrays: Sequence[Array], limits: Sequence[Any]) -> list[Array]:
    """The norms of some arrays, none of which overflows; `limits` is what they are compared with."""
    xp = namespace(arrays[0])
    if not array_api_compat.is_jax_namespace(xp):
        return [_norm(x) for x in arrays]
    # XLA takes three times as long for the largest element as for the sum of squares, which nearly always will do.
    quick = [_quick_norm(x) for x in arrays]
    is_fine = xp.all(xp.stack([xp.isfinite(x) for x in quick] + [xp.asarray(k > _LEAST_LIMIT) for k in limits]))
    lax = sys.modules["jax"].lax
    if isinstance(is_fine, sys.modules["jax"].core.Tracer):
        return lax.cond(is_fine, lambda: quick, lambda: [_norm(x) for x in arrays])  # type: ignore[no-any-return]
    return quick if is_fine else [_norm(x) for x in arrays]


def _quick_norm(x: Array) -> Array:
    xp = namespace(x)
    parts = [_wide(xp, part) for part in ((xp.real(x), xp.imag(x)) if is_complex(x) else (x,))]
    return xp.sqrt(sum(xp.sum(part * part) for part in parts))


def _norm(x: Array) -> Array:
    xp = namespace(x)
    x = _wide(xp, xp.abs(_cast(xp, x, x)))
    if 0 in x.shape:
        return xp.sum(x)
    return root_of_squares(xp, xp.max(x), lambda unit: xp.sum((x / unit) ** 2))


def _wide(xp: Any, x: Array) -> Array:
    """Real numbers in float64, where there is such a thing, or in float32."""
    has_double = "float64" in xp.__array_namespace_info__().dtypes()
    return xp.astype(x, xp.float64) if has_double else _cast(xp, x, x)


def root_of_squares(xp: Any, peak: Array, sum_of_squares: Any) -> Array:
    """A norm by its largest element `peak`: not finite only if that is not."""
    finite = xp.isfinite(peak)
    unit = xp.where((peak > 0) & finite, peak, xp.ones_like(peak))
    total = unit * xp.sqrt(sum_of_squares(unit))
    largest = xp.ones_like(peak) * xp.finfo(peak.dtype).max
    return xp.where(finite & (total > largest), largest, total)


def _cast(xp: Any, x: Array, like: Array) -> Array:
    return xp.astype(x, getattr(xp, SLOT[dtype_name(like)]))


def _stored(xp: Any, p: Array, value: Array, slots: Slots, overwrite: Any) -> tuple[Array, Slots]:
    if "average" in slots:
        value = select(overwrite, slots["average"], value)
    new, master = put_value(xp, p, slots.get("master"), value)
    return new, slots if master is None else slots | {"master": master}


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
