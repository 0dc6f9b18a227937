"""The arrays of a state by their positions: replaced, saved and loaded as Keras does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.moments import CODES, SCALES, check_scales
from ..state import Place, check_scalar
from .stores.targets import adapted


def replace(places: Sequence[Place], values: Sequence[Any], what: str) -> None:
    """Give every array another value; nothing is written unless all of them fit.

    Raises
    ------
    ValueError
        If the count, a shape or a kind of dtype differs; the message says which.
    """
    if len(values) != len(places):
        raise ValueError(f"{what} holds {len(values)} arrays; expected {len(places)}: {_names(places)}")
    ready = []
    for (name, own, key), value in zip(places, values, strict=True):
        value = value if arrays.is_array(value) else np.asarray(value)
        if tuple(value.shape) != tuple(own[key].shape):
            raise ValueError(f"{what}: {brief(name)} has shape {tuple(value.shape)}; expected {tuple(own[key].shape)}")
        is_code = arrays.dtype_name(own[key]) in CODES
        if _kind(value) != _kind(own[key]) or (is_code and arrays.dtype_name(value) != arrays.dtype_name(own[key])):
            raise ValueError(
                f"{what}: {brief(name)} has dtype {arrays.dtype_name(value)}; expected {arrays.dtype_name(own[key])}"
            )
        if key in SCALES:
            check_scales(f"{what}: {brief(name)}", arrays.to_numpy(value))
        if "iteration" in own:
            check_scalar(key, value, what)
        ready.append((own, key, arrays.like(own[key], value)))
    arrays.write_all([(own[key], value) for own, key, value in ready if arrays.is_mutable(own[key])])
    for own, key, value in ready:
        if not arrays.is_mutable(own[key]):
            own[key] = value


def save(places: Sequence[Place], store: Any) -> None:
    """Put a NumPy copy of every array into a mapping, under ``"0"``, ``"1"``, ..."""
    store = adapted(store)
    for index, (_, own, key) in enumerate(places):
        store[str(index)] = arrays.to_numpy(own[key])


def load(places: Sequence[Place], store: Any) -> None:
    """Take every array from a mapping that `save`, or Keras, has filled.

    Raises
    ------
    ValueError
        If the keys, a shape or a kind of dtype differ.
    """
    store = adapted(store)
    found, expected = list(store.keys()), [str(index) for index in range(len(places))]
    if sorted(map(repr, found)) != sorted(map(repr, expected)):
        raise ValueError(
            f"`store` holds the keys {brief_names(found)}; expected '0' to {expected[-1]!r} for {_names(places)}"
        )
    replace(places, [np.asarray(store[key]) for key in expected], "store")


def _names(places: Sequence[Place]) -> str:
    return brief_names([name for name, _, _ in places])


def _kind(array: Array) -> str:
    name = arrays.dtype_name(array).rstrip("0123456789")
    return {"bfloat": "float", "uint": "int"}.get(name, name)
