"""Where a minimization starts: copies of the arrays of `x0`, within their bounds."""

import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, flatten, materialized, rebuild
from .bounds import Bounds, read_bounds, within
from .scaling import Scale, read_scale, scale_of_start


class Problem(NamedTuple):
    """The arrays to move, how far they may, and in which units."""

    names: list[str]
    container: Container
    leaves: list[Array]  # copies, within the bounds
    bounds: Bounds | None
    scale: Scale | None
    is_scale_given: bool


def read_problem(x0: Any, bounds: Any, x_scale: Any, wants_units: bool, may_be_empty: bool = False) -> Problem:
    """Copies of the arrays of `x0`, as floats, moved into the bounds.

    Raises
    ------
    TypeError
        If something is no array of real numbers.
    ValueError
        If `x0` is empty, a number is not finite, or the bounds or units do not fit.
    """
    if x0 is None:
        raise TypeError("`x0` is None; expected an array, or a container of arrays")
    if _is_numbers(x0):
        x0 = np.atleast_1d(np.asarray(x0))
    if hasattr(x0, "__array__") and not arrays.is_array(x0):  # a Series of pandas, say
        x0 = np.asarray(x0)
    container = materialized(x0, "x0")
    names, leaves = flatten(container, "x0")
    names = ["x0"] if arrays.is_array(container) else names  # as it is called in messages
    if not leaves and not may_be_empty:
        raise ValueError("`x0` is empty; expected at least one array")
    copies = [_checked_copy(name, leaf, may_be_empty) for name, leaf in zip(names, leaves, strict=True)]
    read = read_bounds(bounds, container, names, copies)
    copies = copies if read is None else within(copies, read)
    scale = scale_of_start(copies, read) if wants_units and x_scale is None else None
    if x_scale is not None:
        scale = read_scale(x_scale, container, names, copies, read)
    return Problem(names, rebuild(container, copies), copies, read, scale, x_scale is not None)


def _is_numbers(x0: Any) -> bool:
    """Whether `x0` is a number, or nested lists of numbers: an array to SciPy, where lists of arrays are a nesting."""
    if isinstance(x0, (numbers.Number, np.generic)):
        return True
    return isinstance(x0, (list, tuple)) and bool(x0) and all(map(_is_numbers, x0))


def _checked_copy(name: str, leaf: Any, may_be_empty: bool) -> Array:
    what = "`x0`" if name == "x0" else f"`x0` at {brief(name)}"
    leaf = _of_floats(what, arrays.seen(leaf, what))  # of a library without a namespace: NumPy's
    if arrays.is_complex(leaf):
        dtype = arrays.dtype_name(leaf)
        raise TypeError(f"{what} has dtype {dtype}; expected real numbers: pass the real and imaginary parts")
    copy = leaf if isinstance(leaf, np.ndarray) else arrays.like(leaf, leaf)
    arrays.check_variable(name, copy)
    if math.prod(copy.shape) == 0 and not may_be_empty:
        raise ValueError(f"{what} has shape {tuple(copy.shape)}, which is empty; expected at least one element")
    xp = arrays.namespace(copy)
    if not bool(xp.all(xp.isfinite(copy))):
        raise ValueError(f"{what} holds NaN or infinity; expected finite numbers")
    return copy


def _of_floats(what: str, leaf: Array) -> Array:
    """Integers as floats; of NumPy's arrays, a copy in C order and the machine's byte order."""
    dtype = arrays.dtype_name(leaf)
    if isinstance(leaf, np.ndarray):
        if isinstance(leaf, np.ma.MaskedArray):
            raise TypeError(f"{what} is a {type(leaf).__name__}; expected an array without a mask")
        leaf = np.asarray(leaf)  # of a subclass, the numbers
        if dtype not in arrays.COMPUTE and leaf.dtype.kind not in "iub":
            raise TypeError(f"{what} has dtype {dtype:.100}; expected real numbers: float32, float64, ...")
        to = np.float64 if leaf.dtype.kind in "iub" else leaf.dtype.newbyteorder("=")
        return np.array(leaf, to, order="C", copy=True, subok=False)
    if dtype.startswith(("int", "uint", "bool")):
        xp = arrays.namespace(leaf)
        return xp.astype(leaf, xp.__array_namespace_info__().default_dtypes()["real floating"])
    return leaf
