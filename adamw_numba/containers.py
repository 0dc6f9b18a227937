"""Nested dicts and lists of arrays, and lists of ``(name, array)`` pairs, as one flat list of paths and arrays."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from .arrays import are_arrays, is_array

Container = Any
_BY_KEY, _BY_POSITION = (dict, OrderedDict), (list, tuple)


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


class Form:
    """A container as it once was, all of it: another one like it is taken apart without a second look at its paths.

    Parameters
    ----------
    tree : tuple
        The container's type, its keys, and for each key a tree, or None for a leaf; None instead of leaves only.
    order : list of int
        Where each name's leaf is among those of the container.
    """

    def __init__(self, tree: tuple[Any, ...], order: list[int]) -> None:
        self._tree = tree
        self._sort = None if order == sorted(order) else itemgetter(*order)

    def flat(self, container: Container) -> Container:
        """A list of the leaves, in the order of the names; the container itself if it is not like this one."""
        leaves: list[Any] = []
        try:
            if not _take(self._tree, container, leaves) or not are_arrays(leaves):
                return container
        except KeyError:
            return container
        return list(self._sort(leaves)) if self._sort else leaves


def form_of(container: Container, expected: list[str]) -> Form | None:
    """The form of a container that holds a leaf for each expected name; None if it is a list of leaves, or unusual."""
    tree = _tree(container)
    if tree is None or (tree[0] is list and tree[2] is None):
        return None
    names = flatten(container)[0]
    return Form(tree, [names.index(name) for name in in_order(names, names, expected, "container")])


def _tree(value: Container) -> tuple[Any, ...] | None:
    kind = type(value)
    if kind in _BY_KEY and all(type(key) is str for key in value):
        keys = tuple(value)
    elif kind in _BY_POSITION and not (value and all(_is_pair(item) for item in value)):
        keys = tuple(range(len(value)))
    else:
        return None
    children = [None if _is_leaf(value[key]) else _tree(value[key]) or () for key in keys]
    if () in children:  # something below has no tree
        return None
    return kind, keys, children if any(children) else None


def _take(tree: tuple[Any, ...], value: Container, leaves: list[Any]) -> bool:
    """Add the leaves of a container to a list; False, or a KeyError, where it is not like the tree."""
    kind, keys, children = tree
    if type(value) is not kind or len(value) != len(keys):
        return False
    if children is None:
        leaves.extend(map(value.__getitem__, keys))
        return True
    for key, child in zip(keys, children, strict=True):
        if child is None:
            leaves.append(value[key])
        elif not _take(child, value[key], leaves):
            return False
    return True


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
