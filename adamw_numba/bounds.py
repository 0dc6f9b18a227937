"""Lower and upper bounds, as SciPy takes them, for arrays of any library and nestings of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np

from . import arrays
from .arrays import Array

Matrix = np.ndarray[Any, Any]


def read_bounds(bounds: Any, names: Sequence[str], leaves: Sequence[Array]) -> list[tuple[Array, Array]] | None:
    """Bounds as a pair of arrays like each variable; None where there are none.

    Raises
    ------
    TypeError
        If they are neither `scipy.optimize.Bounds` nor pairs.
    ValueError
        If a shape does not fit, one is NaN, or a lower one is above the upper one.
    """
    if bounds is None:
        return None
    nested = names != ["0"] or isinstance(bounds, Mapping)
    pairs = []
    for name, leaf in zip(names, leaves, strict=True):
        own = _of_path(bounds, name) if nested else bounds
        lower, upper = _pair(own, name, tuple(leaf.shape), nested)
        _check(name, lower, upper)
        pairs.append((_like(leaf, lower), _like(leaf, upper)))
    return pairs


def _of_path(bounds: Any, name: str) -> Any:
    """What bounds, nested like the variables, say about one of them; what is not named is not bounded."""
    for key in name.split("/"):
        if bounds is None or _is_bounds(bounds) or _is_pair(bounds):
            return bounds
        if isinstance(bounds, Mapping):
            bounds = bounds.get(key)
        elif isinstance(bounds, Sequence) and key.isdigit() and int(key) < len(bounds):
            bounds = bounds[int(key)]
        else:
            raise TypeError(
                f"`bounds` is {bounds!r} at {name!r}; expected `Bounds`, or a dict or list like the variables of them"
            )
    return bounds


def _is_bounds(bounds: Any) -> bool:
    return hasattr(bounds, "lb") and hasattr(bounds, "ub")


def _is_pair(bounds: Any) -> bool:
    """Whether bounds are one pair for all that lies below."""
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    return pair and all(bound is None or np.ndim(bound) == 0 for bound in bounds)


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
    except (TypeError, ValueError) as error:
        raise ValueError(f"`bounds` of {name!r} do not fit: {error}; expected bounds of shape {shape}") from None


def _columns(bounds: Any, name: str, shape: tuple[int, ...]) -> tuple[Matrix, Matrix]:
    """Pairs ``(lower, upper)``, one for each element, None for no bound."""
    try:
        pairs = [tuple(pair) for pair in bounds]
    except TypeError:
        raise TypeError(
            f"`bounds` of {name!r} is {bounds!r}; expected `scipy.optimize.Bounds`, or one (lower, upper) pair for "
            "each element"
        ) from None
    count = int(np.prod(shape))
    if len(pairs) != count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"`bounds` of {name!r} has {len(pairs)} entries of lengths {sorted({len(pair) for pair in pairs})}; "
            f"expected {count} pairs (lower, upper), for shape {shape}"
        )
    lower = [-np.inf if low is None else low for low, _ in pairs]
    upper = [np.inf if high is None else high for _, high in pairs]
    return np.asarray(lower, np.float64).reshape(shape), np.asarray(upper, np.float64).reshape(shape)


def _check(name: str, lower: Matrix, upper: Matrix) -> None:
    wrong = ~(lower <= upper) | (lower == np.inf) | (upper == -np.inf)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"`bounds` of {name!r} at {where} are {lower[where]} and {upper[where]}; expected lower <= upper, not NaN"
        )


def _like(leaf: Array, bound: Matrix) -> Array:
    if isinstance(leaf, np.ndarray):
        return np.array(bound, leaf.dtype, order="C")
    xp = arrays.namespace(leaf)
    bound = bound.astype("float64" if arrays.dtype_name(leaf) == "float64" else "float32")
    return xp.astype(xp.asarray(bound, device=array_api_compat.device(leaf)), leaf.dtype)
