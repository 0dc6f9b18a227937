"""Nested dicts and lists of arrays, and lists of ``(name, array)`` pairs, as one flat list of paths and arrays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .arrays import is_array

Container = Any


def flatten(container: Container, what: str = "variables") -> tuple[list[str], list[Any]]:
    """The paths and the leaves of a container, in order; a list's entries are named ``0``, ``1``, ...

    Parameters
    ----------
    container : array, dict, list, tuple, iterable of ``(str, array)`` pairs, or a nesting of these
        ``None`` counts as a leaf: a gradient that does not exist.
    what : str
        What errors call the container.

    Raises
    ------
    TypeError
        If a leaf is no array.
    ValueError
        If a key holds ``/``, or two leaves have the same path.
    """
    names: list[str] = []
    leaves: list[Any] = []
    _collect(container, "", what, names, leaves)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what} holds the name {twice!r} more than once; expected every name once")
    return names, leaves


def rebuild(container: Container, leaves: Iterable[Any]) -> Container:
    """A container of the same shape with other leaves: dicts stay dicts, pairs stay pairs, the rest become lists."""
    return _rebuild(container, iter(leaves).__next__)


def materialized(container: Container) -> Container:
    """The container itself, or a list of what an iterator yields, so that it can be walked twice."""
    walkable = _is_leaf(container) or isinstance(container, (Mapping, Sequence))
    return container if walkable else list(container)


def in_order(names: list[str], leaves: list[Any], expected: list[str], what: str) -> list[Any]:
    """Leaves in the order of the expected names: by name, or by position in a flat list."""
    if names == expected or (len(names) == len(expected) and names == list(map(str, range(len(names))))):
        return leaves
    if sorted(names) == sorted(expected):
        by_name = dict(zip(names, leaves, strict=True))
        return [by_name[name] for name in expected]
    positional = names == list(map(str, range(len(names))))
    missing, unknown = ([n for n in one if n not in other] for one, other in ((expected, names), (names, expected)))
    if positional or not missing + unknown:
        raise ValueError(
            f"`{what}` must match the variables of the optimizer one-to-one. Received {len(names)} arrays; the "
            f"optimizer has {len(expected)}: {expected}"
        )
    raise ValueError(f"`{what}` lacks {missing} and holds the unknown {unknown}; expected {expected}")


def _is_leaf(value: object) -> bool:
    return value is None or is_array(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _collect(value: Container, path: str, what: str, names: list[str], leaves: list[Any]) -> None:
    if _is_leaf(value):
        names.append(path or "0")
        leaves.append(value)
        return
    for key, child in _children(value, path, what):
        if "/" in key:
            raise ValueError(f"{what} has the key {key!r}; expected no '/' in a key: it joins the keys of a path")
        _collect(child, f"{path}/{key}" if path else key, what, names, leaves)


def _children(value: Container, path: str, what: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        where = f"{what} at {path!r}" if path else what
        if hasattr(value, "named_parameters"):
            raise TypeError(f"{where} is a {type(value).__name__} module; expected its `named_parameters()`")
        raise TypeError(
            f"{where} is {value!r} of type {type(value).__name__}; expected an array, a dict, a list, or a list of "
            "(name, array) pairs"
        )
    items = list(value)
    if items and all(_is_pair(item) for item in items):
        return items
    return [(str(index), child) for index, child in enumerate(items)]


def _rebuild(value: Container, take: Callable[[], Any]) -> Container:
    if _is_leaf(value):
        return take()
    if isinstance(value, Mapping):
        return {key: _rebuild(child, take) for key, child in value.items()}
    items = list(value)
    if items and all(_is_pair(item) for item in items):
        return [(name, _rebuild(child, take)) for name, child in items]
    return [_rebuild(child, take) for child in items]
