"""Lower and upper bounds: as SciPy takes them, for arrays of any library and nestings of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.tree import Container, node_of, rebuild

Matrix = np.ndarray[Any, Any]
Bounds = list[tuple[Array, Array]]  # lower and upper ones of each array


def read_bounds(bounds: Any, container: Container, names: Sequence[str], leaves: Sequence[Array]) -> Bounds | None:
    """Bounds as a pair of arrays like each variable; None where there are none.

    Raises
    ------
    TypeError
        If they are neither `scipy.optimize.Bounds` nor pairs.
    ValueError
        If a shape does not fit, one is NaN, a lower one is above the upper one, or there is no such variable.
    """
    if bounds is None:
        return None
    nested = not arrays.is_array(container)
    each = _of_each(bounds, container, len(names)) if nested else [bounds]
    pairs = []
    for own, name, leaf in zip(each, names, leaves, strict=True):
        lower, upper = _pair(own, name, tuple(leaf.shape), nested)
        _check(name, lower, upper)
        pairs.append(tuple(_like(leaf, bound) for bound in _rounded_inward(arrays.dtype_name(leaf), lower, upper)))
        _check_cast(name, *pairs[-1])
    return pairs


# Nested bounds


def _of_each(bounds: Any, container: Container, count: int) -> list[Any]:
    """What bounds, nested like the variables, say about each of them; what is not mentioned is not bounded.

    The two are walked side by side: a name does not tell where in the container its array is, since keys may hold "/".
    """
    found: list[Any] = [None] * count
    _walk(bounds, rebuild(container, range(count)), found)
    return found


def _walk(bounds: Any, positions: Any, found: list[Any]) -> None:
    """Note the bounds of a container in which each array's position stands for the array."""
    if isinstance(positions, int):
        found[positions] = bounds
        return
    children = {str(key): child for key, child in _items(positions).items()}
    if bounds is None or _is_bounds(bounds) or _is_pair(bounds):
        bounds = dict.fromkeys(children, bounds)  # one for all that is below
    elif type(bounds) in (list, tuple) and hasattr(positions, "_fields") and len(bounds) == len(children):
        bounds = dict(zip(children, bounds, strict=True))
    elif node_of(bounds) is None:
        raise TypeError(
            f"`bounds` holds {brief(bounds)} for {brief_names(children)}; expected `Bounds`, pairs, or a dict or list "
            "of them like x0"
        )
    items = _items(bounds)
    unknown = [key for key in items if str(key) not in children]
    if unknown:
        raise ValueError(
            f"`bounds` holds {brief_names(unknown)}, which x0 does not; expected bounds of {brief_names(children)}"
        )
    for key, own in items.items():
        if children[str(key)] is not None:
            _walk(own, children[str(key)], found)


def _items(container: Any) -> dict[Any, Any]:
    """What a container holds, by key, name or position."""
    node = node_of(container)
    return {} if node is None else dict(zip(node.keys, node.children, strict=True))


def _is_bounds(bounds: Any) -> bool:
    return hasattr(bounds, "lb") and hasattr(bounds, "ub")


def _is_pair(bounds: Any) -> bool:
    """Whether bounds are one pair for all that is below."""
    return isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(map(_is_number, bounds))


def _is_number(bound: Any) -> bool:
    if bound is None:
        return True
    # NumPy takes a dict, text and SciPy's Bounds for arrays of no dimensions.
    return not isinstance(bound, (Mapping, list, tuple, str)) and not _is_bounds(bound) and np.ndim(bound) == 0


# The bounds of one array


def _pair(bounds: Any, name: str, shape: tuple[int, ...], nested: bool) -> tuple[Matrix, Matrix]:
    if bounds is None:
        return np.full(shape, -np.inf), np.full(shape, np.inf)
    if _is_bounds(bounds):
        lower, upper = bounds.lb, bounds.ub
    elif nested and _is_pair(bounds):
        lower, upper = bounds
        lower, upper = (-np.inf if lower is None else lower), (np.inf if upper is None else upper)
    else:
        lower, upper = _columns(bounds, name, shape)
    try:
        return tuple(np.broadcast_to(np.asarray(b, np.float64), shape) for b in (lower, upper))  # type: ignore[return-value]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"`bounds` of {brief(name)} do not fit: {error!s:.200}; expected bounds of shape {shape}"
        ) from None


def _columns(bounds: Any, name: str, shape: tuple[int, ...]) -> tuple[Matrix, Matrix]:
    """Pairs ``(lower, upper)``, one for each element, None for no bound."""
    try:
        pairs = [tuple(pair) for pair in bounds]
    except TypeError:
        raise TypeError(
            f"`bounds` of {brief(name)} is {brief(bounds)}; expected `scipy.optimize.Bounds`, or one (lower, upper) "
            "pair for each element"
        ) from None
    count = int(np.prod(shape))
    if len(pairs) != count or any(len(pair) != 2 for pair in pairs):
        lengths = sorted({len(pair) for pair in pairs})
        raise ValueError(
            f"`bounds` of {brief(name)} has {len(pairs)} entries of lengths {brief_names(lengths)}; expected {count} "
            f"pairs (lower, upper), for shape {shape}"
        )
    lower = [-np.inf if low is None else low for low, _ in pairs]
    upper = [np.inf if high is None else high for _, high in pairs]
    try:
        return np.asarray(lower, np.float64).reshape(shape), np.asarray(upper, np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"`bounds` of {brief(name)} is {brief(bounds)}; expected pairs of numbers or None: {error!s:.200}"
        ) from None


def _check(name: str, lower: Matrix, upper: Matrix) -> None:
    wrong = ~(lower <= upper) | (lower == np.inf) | (upper == -np.inf)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"`bounds` of {brief(name)} at {where} are {lower[where]} and {upper[where]}; expected lower <= upper, not "
            "NaN"
        )


def _check_cast(name: str, lower: Array, upper: Array) -> None:
    if bool(arrays.namespace(lower).any((lower == np.inf) | (upper == -np.inf))):
        raise ValueError(
            f"`bounds` of {brief(name)} lie beyond the range of {arrays.dtype_name(lower)}; expected bounds within it"
        )


def _rounded_inward(dtype: str, lower: Matrix, upper: Matrix) -> tuple[Matrix, Matrix]:
    """Bounds that an array of a dtype can hold, and none outside of those given; equal ones stay equal."""
    if dtype not in ("float16", "float32"):
        return lower, upper
    with np.errstate(over="ignore"):
        low, high = lower.astype(dtype), upper.astype(dtype)
        free, infinity = lower < upper, np.array(np.inf, dtype)
        low = np.where(free & (low < lower), np.nextafter(low, infinity), low)
        high = np.where(free & (high > upper), np.nextafter(high, -infinity), high)
    crossed = low > high  # no number of the dtype lies between them
    return np.where(crossed, lower, low), np.where(crossed, upper, high)


def _like(leaf: Array, bound: Matrix) -> Array:
    with np.errstate(over="ignore"):
        if isinstance(leaf, np.ndarray):
            return np.array(bound, leaf.dtype, order="C")
        bound = bound.astype("float64" if arrays.dtype_name(leaf) == "float64" else "float32")
    xp = arrays.namespace(leaf)
    return xp.astype(xp.asarray(bound, device=array_api_compat.device(leaf)), leaf.dtype)


# What bounds do


def within(leaves: Sequence[Array], bounds: Bounds) -> list[Array]:
    """Arrays projected onto their bounds."""
    return [_within(x, *pair) for x, pair in zip(leaves, bounds, strict=True)]


def _within(x: Array, lower: Array, upper: Array) -> Array:
    # Not `clip`: what lies within stays as it is, the sign of a zero included, as in the compiled loop.
    xp = arrays.namespace(x)
    x = xp.where(x < lower, lower, x)
    return xp.where(x > upper, upper, x)


def inward(x: Sequence[Array], gradients: Sequence[Array], bounds: Bounds) -> list[Array]:
    """Gradients without what pushes out of the bounds."""
    result = []
    for leaf, g, (lower, upper) in zip(x, gradients, bounds, strict=True):
        xp = arrays.namespace(g)
        result.append(xp.where(((leaf <= lower) & (g > 0)) | ((leaf >= upper) & (g < 0)), xp.zeros_like(g), g))
    return result
