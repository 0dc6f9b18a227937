"""Lower and upper bounds, as SciPy takes them, for arrays of any library and nestings of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np

from .. import arrays
from ..arrays import Array

Matrix = np.ndarray[Any, Any]


def read_bounds(
    bounds: Any, names: Sequence[str], leaves: Sequence[Array], nested: bool
) -> list[tuple[Array, Array]] | None:
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
    if nested:
        _check_names(bounds, [tuple(name.split("/")) for name in names])
    pairs = []
    for name, leaf in zip(names, leaves, strict=True):
        own = _of_path(bounds, name) if nested else bounds
        lower, upper = _pair(own, name, tuple(leaf.shape), nested)
        _check(name, lower, upper)
        pairs.append((_like(leaf, lower), _like(leaf, upper)))
        _check_cast(name, *pairs[-1])
    return pairs


def _check_names(bounds: Any, paths: list[tuple[str, ...]]) -> None:
    """Refuse bounds of what is no variable."""
    if paths == [()] or _is_bounds(bounds) or _is_pair(bounds) or not isinstance(bounds, (Mapping, list, tuple)):
        return
    known = list(dict.fromkeys(path[0] for path in paths))
    items = bounds if isinstance(bounds, Mapping) else dict(enumerate(bounds))
    unknown = [key for key in items if str(key) not in known]
    if unknown:
        raise ValueError(f"`bounds` holds {unknown}, which x0 does not; expected bounds of {known}")
    for key, own in items.items():
        _check_names(own, [path[1:] for path in paths if path[0] == str(key)])


def _of_path(bounds: Any, name: str) -> Any:
    """What bounds, nested like the variables, say about one of them; what is not named is not bounded."""
    for key in name.split("/"):
        if bounds is None or _is_bounds(bounds) or _is_pair(bounds):
            return bounds
        if isinstance(bounds, Mapping):
            bounds = {str(own): value for own, value in bounds.items()}.get(key)
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
    except (TypeError, ValueError, OverflowError) as error:
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
    try:
        return np.asarray(lower, np.float64).reshape(shape), np.asarray(upper, np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"`bounds` of {name!r} is {bounds!r}; expected pairs of numbers or None: {error}") from None


def _check(name: str, lower: Matrix, upper: Matrix) -> None:
    wrong = ~(lower <= upper) | (lower == np.inf) | (upper == -np.inf)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"`bounds` of {name!r} at {where} are {lower[where]} and {upper[where]}; expected lower <= upper, not NaN"
        )


def _check_cast(name: str, lower: Array, upper: Array) -> None:
    if bool(arrays.namespace(lower).any((lower == np.inf) | (upper == -np.inf))):
        raise ValueError(
            f"`bounds` of {name!r} lie beyond the range of {arrays.dtype_name(lower)}; expected bounds within it"
        )


def _like(leaf: Array, bound: Matrix) -> Array:
    with np.errstate(over="ignore"):
        if isinstance(leaf, np.ndarray):
            return np.array(bound, leaf.dtype, order="C")
        bound = bound.astype("float64" if arrays.dtype_name(leaf) == "float64" else "float32")
    xp = arrays.namespace(leaf)
    return xp.astype(xp.asarray(bound, device=array_api_compat.device(leaf)), leaf.dtype)
