"""What an objective returns: a number and gradients, checked."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, matched


class Evaluation(NamedTuple):
    """What one iteration learns."""

    value: float
    gradients: list[Array]
    calls: int  # of `fun`


def number_of(value: Any) -> float:
    """The value of the objective as a float.

    Raises
    ------
    TypeError
        If it is no real number.
    ValueError
        If no float is as large.
    """
    try:
        if isinstance(value, (bool, int, float)):
            return float(value)
        value = arrays.seen(value)
        size = math.prod(value.shape) if hasattr(value, "shape") else None
        name = arrays.dtype_name(value) if size == 1 else ""
        if name and not name.startswith(("complex", "object", "str")):
            return float(value if value.shape == () else value.reshape(-1)[0])
    except (TypeError, AttributeError):
        pass
    except OverflowError:
        raise ValueError(f"`fun` returned {returned(value)}; expected a number within the range of float64") from None
    hint = ""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        hint = ": pass jac=True if `fun` returns the value and the gradient"
    raise TypeError(f"`fun` returned {returned(value)}; expected a real number{hint}")


def gradients_of(gradient: Container, container: Container, names: list[str], leaves: Sequence[Array]) -> list[Array]:
    """The gradients of all variables, in their order, from a container like theirs.

    Raises
    ------
    TypeError, ValueError
        If one is of another shape, library or kind than its variable, or is missing.
    """
    if len(leaves) == 1 and arrays.is_array(container):
        return [gradient_of("", gradient, leaves[0])]
    is_flat = type(gradient) is list and len(gradient) == len(names) and arrays.are_arrays(gradient)
    ordered = gradient if is_flat else matched(gradient, names, "the gradient")
    return [gradient_of(name, g, x) for name, g, x in zip(names, ordered, leaves, strict=True)]


def gradient_of(name: str, gradient: Any, x: Array) -> Array:
    """The gradient of one variable, checked; errors say the name, if there is one."""
    if type(gradient) is type(x) and _are_alike(gradient, x) and (gradient is not x or not arrays.is_mutable(x)):
        return gradient  # most
    what = f"the gradient of {brief(name)}" if name else "the gradient"
    if gradient is None or isinstance(gradient, np.ma.MaskedArray):
        raise TypeError(f"{what} is {brief(gradient)}; expected an array of shape {tuple(x.shape)}, without a mask")
    if not isinstance(x, np.ndarray):
        _check_shape(what, gradient, x)
        arrays.check_gradient(name or "x", gradient, x)
        return gradient
    if type(gradient) is not np.ndarray:
        if type(gradient).__module__.partition(".")[0] == "torch" and "torch" in sys.modules:
            gradient = _host_tensor(what, gradient.detach())
        if arrays.family(gradient) == "foreign":
            gradient = arrays.seen(gradient, what)
        gradient = np.asarray(gradient)
    if gradient.dtype.kind not in "fiub":
        raise TypeError(f"{what} has dtype {gradient.dtype!s:.100}; expected real numbers")
    if gradient.shape == () and x.shape == (1,):
        gradient = gradient.reshape(1)
    _check_shape(what, gradient, x)
    return gradient


def _host_tensor(what: str, gradient: Any) -> Any:
    """A tensor as NumPy's, where NumPy has such arrays."""
    try:
        return arrays.to_numpy(gradient)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"{what} is a tensor that NumPy cannot take ({brief(str(error))}); expected an array") from None


def _are_alike(one: Array, other: Array) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if type(one) is np.ndarray:
        return True
    is_there = getattr(one, "device", None) == getattr(other, "device", None)
    return is_there and getattr(one, "layout", None) == getattr(other, "layout", None)


def _check_shape(what: str, gradient: Any, x: Array) -> None:
    shape = tuple(getattr(gradient, "shape", ()))
    if arrays.is_array(gradient) and shape != tuple(x.shape):
        raise ValueError(f"{what} has shape {shape}; expected {tuple(x.shape)}, the shape of x")


def returned(value: Any) -> str:
    """A value that was returned, for a message."""
    return f"{brief(value)} of type {type(value).__name__}"
