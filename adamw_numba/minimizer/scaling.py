"""Units of x: with `x_scale`, the optimizer moves ``x / x_scale``; everything else sees x."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, matched, node_of
from .bounds import Bounds

Scale = list[Array]  # the unit of each element of each array


def read_scale(
    x_scale: Any, container: Container, names: Sequence[str], leaves: Sequence[Array], bounds: Bounds | None
) -> Scale:
    """The units that are asked for, as arrays like the variables.

    Raises
    ------
    TypeError, ValueError
        If they do not fit, or are not finite and positive; if they are to come from bounds that are not finite.
    """
    if isinstance(x_scale, str):
        if x_scale != "bounds":
            raise ValueError(f"`x_scale` is {brief(x_scale)}; expected 'bounds', a number, or arrays like x0")
        return _widths(bounds)
    if not arrays.is_array(container) and not np.isscalar(x_scale):
        each = matched(_as_arrays(x_scale), list(names), "`x_scale`")
    else:
        each = [x_scale] * len(leaves)
    return [_like(name, leaf, own) for name, leaf, own in zip(names, leaves, each, strict=True)]


def _as_arrays(x_scale: Any) -> Any:
    """A nesting of numbers as one of arrays."""
    if isinstance(x_scale, numbers.Real):
        return np.asarray(x_scale)
    node = None if x_scale is None or arrays.is_array(x_scale) else node_of(x_scale)
    return x_scale if node is None else node.make(map(_as_arrays, node.children))


def _widths(bounds: Bounds | None) -> Scale:
    if bounds is None:
        raise ValueError("`x_scale` is 'bounds' and `bounds` is None; expected finite bounds")
    found = []
    for lower, upper in bounds:
        xp = arrays.namespace(lower)
        width = upper - lower
        if not bool(xp.all(xp.isfinite(width))):
            raise ValueError("`x_scale` is 'bounds', which are not all finite; expected finite bounds")
        found.append(xp.where(width > 0, width, xp.ones_like(width)))
    return found


def _like(name: str, leaf: Array, own: Any) -> Array:
    what = "`x_scale`" if name == "x0" else f"`x_scale` of {brief(name)}"
    try:
        given = np.asarray(arrays.to_numpy(own) if arrays.is_array(own) else own, np.float64)
        given = np.array(np.broadcast_to(given, tuple(leaf.shape)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{what} is {brief(own)}; expected a number, or numbers of shape {tuple(leaf.shape)}"
        ) from None
    with np.errstate(all="ignore"):
        found = arrays.like(leaf, given if isinstance(leaf, np.ndarray) else given.astype(_near(leaf)))
    xp = arrays.namespace(found)
    if not bool(xp.all((found > 0) & xp.isfinite(found))):  # in the dtype of x
        raise ValueError(f"{what} is {brief(own)}; expected finite numbers > 0 within {arrays.dtype_name(leaf)}")
    if not bool(xp.all(xp.isfinite(divided([leaf], [found])[0]))):
        raise ValueError(f"{what} is {brief(own)}, so small that x0 in these units is infinite; expected a larger unit")
    return found


def _near(leaf: Array) -> str:
    """The dtype of NumPy that holds what an array of another library can."""
    return "float64" if arrays.dtype_name(leaf) == "float64" else "float32"


def scale_of_start(leaves: Sequence[Array], bounds: Bounds | None) -> Scale:
    """The units to begin with where none are given: an element's size, at least 1, at most the width of its bounds."""
    found = []
    for k, x in enumerate(leaves):
        xp = arrays.namespace(x)
        size = xp.maximum(xp.abs(x), xp.ones_like(x))
        if bounds is not None:
            lower, upper = bounds[k]
            width = upper - lower
            size = xp.where((width > 0) & (width < size), width, size)
        found.append(size)
    return found


def scale_of_stage(x: Sequence[Array], start: Sequence[Array]) -> Scale:
    """The units of a later stage: an element's size where it is now, or a tenth of how far it has come."""
    found = []
    for here, there in zip(x, start, strict=True):
        xp = arrays.namespace(here)
        size = xp.maximum(xp.abs(here), xp.abs(here - there) / 10)
        found.append(xp.where(size > 0, size, xp.ones_like(size)))
    return found


def multiplied(leaves: Sequence[Array], scale: Scale) -> list[Array]:
    """Each element times its unit."""
    with np.errstate(all="ignore"):
        return [_array(leaf * unit) for leaf, unit in zip(leaves, scale, strict=True)]


def divided(leaves: Sequence[Array], scale: Scale) -> list[Array]:
    """Each element in its unit."""
    with np.errstate(all="ignore"):
        return [_array(leaf / unit) for leaf, unit in zip(leaves, scale, strict=True)]


def _array(value: Any) -> Array:
    """NumPy makes numbers of arrays without dimensions."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def onto_bounds(x: Sequence[Array], inner: Sequence[Array], bounds: Bounds, inner_bounds: Bounds) -> list[Array]:
    """Points within their bounds, and exactly on one where the array that the optimizer moves is."""
    found = []
    for leaf, z, pair, inner_pair in zip(x, inner, bounds, inner_bounds, strict=True):
        xp = arrays.namespace(leaf)
        leaf = xp.where((z <= inner_pair[0]) | (leaf < pair[0]), pair[0], leaf)
        found.append(xp.where((z >= inner_pair[1]) | (leaf > pair[1]), pair[1], leaf))
    return found
