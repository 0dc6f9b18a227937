"""Nested dicts and lists of arrays, and lists of ``(name, array)`` pairs, as one flat list of paths and arrays."""

from collections import Counter, OrderedDict
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from . import are_arrays, is_array
from .advice import advice
from .brief import brief, brief_names

Container = Any
Path = tuple[str, ...]
_BY_KEY, _BY_POSITION = (dict, OrderedDict), (list, tuple)


def flatten(container: Container, what: str = "variables") -> tuple[list[str], list[Any]]:
    """The names and the leaves of a container, in order: the keys that lead to a leaf, joined by ``/``.

    A list's entries have the keys ``0``, ``1``, ... A key may hold ``/`` itself, as the names of Keras and Haiku do.

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
        If a key is empty, two leaves have the same name, or a container holds itself.
    """
    paths, leaves = paths_of(container, what)
    names = ["/".join(path) or "0" for path in paths]
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        raise ValueError(f"{what} holds the name {brief(twice)} more than once; expected every name once")
    return names, leaves


def paths_of(container: Container, what: str) -> tuple[list[Path], list[Any]]:
    """For each leaf of a container, in order, the keys that lead to it, and the leaf itself."""
    paths: list[Path] = []
    leaves: list[Any] = []
    with _not_too_deep(what):
        _collect(container, (), what, paths, leaves)
    return paths, leaves


class Form:
    """How a container was nested: another one like it is flattened at once, without working out its paths again.

    A training loop passes gradients of the same form at every step.

    Parameters
    ----------
    tree : tuple
        The container's type, its keys, and for each key a tree, or None for a leaf; None in place of leaves alone.
    order : list of int
        Where each name's leaf is among those of the container.
    """

    def __init__(self, tree: tuple[Any, ...], order: list[int]) -> None:
        self._tree = tree
        self._sort = None if order == sorted(order) else itemgetter(*order)

    def flat(self, container: Container) -> Container:
        """A list of the leaves, in the order of the names; the container itself if it is nested in another way."""
        leaves: list[Any] = []
        try:
            if not _take(self._tree, container, leaves) or not are_arrays(leaves):
                return container
        except (KeyError, RecursionError):
            return container
        return list(self._sort(leaves)) if self._sort else leaves


def form_of(container: Container, expected: list[str]) -> Form | None:
    """The form of a container that holds a leaf for each expected name; None for a flat list or an odd container."""
    try:
        tree = _tree(container)
    except RecursionError:
        return None
    if tree is None or (tree[0] is list and tree[2] is None):
        return None
    return Form(tree, order(container, flatten(container, "grads")[0], expected, "grads"))


def _tree(value: Container) -> tuple[Any, ...] | None:
    kind = type(value)
    if kind in _BY_KEY and all(type(key) is str for key in value):
        keys = tuple(value)
    elif kind in _BY_POSITION and not _are_pairs(value):
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
    if type(container) is dict and are_arrays(container.values()):  # many
        return dict(zip(container, leaves, strict=True))
    return _rebuild(container, iter(leaves).__next__)


def materialized(container: Container, what: str) -> Container:
    """A container of the same leaves that can be walked twice: dicts, tuples, and lists of what any others yield."""
    with _not_too_deep(what):
        return _materialized(container)


def matched(container: Container, expected: list[str], what: str, may_be_empty: bool = False) -> list[Any]:
    """The leaves of a container in the order of the expected names; or none at all, where that is fine.

    Raises
    ------
    ValueError
        If a count or a name differs.
    """
    container = materialized(container, what)
    names, leaves = flatten(container, what)
    if may_be_empty and not leaves:
        return []
    return [leaves[i] for i in order(container, names, expected, what)]


def order(container: Container, names: list[str], expected: list[str], what: str) -> list[int]:
    """Where each expected name's leaf is among those of a container: by position in a flat list, else by name."""
    positional = names == list(map(str, range(len(names)))) and not _has_keys(container)
    if names == expected or (positional and len(names) == len(expected)):
        return list(range(len(names)))
    if sorted(names) == sorted(expected):
        where = {name: i for i, name in enumerate(names)}
        return [where[name] for name in expected]
    known, given = set(expected), set(names)
    missing, unknown = [n for n in expected if n not in given], [n for n in names if n not in known]
    if positional or not missing + unknown:
        raise ValueError(
            f"`{what}` must match the variables of the optimizer one-to-one. Received {len(names)} arrays; the "
            f"optimizer has {len(expected)}: {brief_names(expected)}"
        )
    wrong = [f"lacks {brief_names(missing)}"] * bool(missing) + [f"holds the unknown {brief_names(unknown)}"] * bool(
        unknown
    )
    raise ValueError(f"`{what}` {' and '.join(wrong)}; expected {brief_names(expected)}")


def _is_leaf(value: object) -> bool:
    return value is None or is_array(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _are_pairs(items: Sequence[Any]) -> bool:
    return bool(items) and all(_is_pair(item) for item in items)


def _has_keys(container: Container) -> bool:
    return isinstance(container, Mapping) or (isinstance(container, (list, tuple)) and _are_pairs(container))


@contextmanager
def _not_too_deep(what: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply, or holds itself; expected a few levels") from None


def _materialized(value: Container) -> Container:
    if _is_leaf(value) or _is_refused(value):
        return value
    if isinstance(value, Mapping):
        return {key: _materialized(child) for key, child in value.items()}
    children = [_materialized(child) for child in value]
    return tuple(children) if isinstance(value, tuple) else children


def _is_refused(value: object) -> bool:
    """What cannot be walked, or has no certain order, or holds keys and is no mapping, or numbers and no arrays."""
    if isinstance(value, (str, bytes, bytearray, memoryview)) or not isinstance(value, Iterable):
        return True
    if isinstance(value, Set):
        return not isinstance(value, (KeysView, ItemsView))
    return not isinstance(value, Mapping) and (hasattr(value, "keys") or hasattr(value, "to_numpy"))


def _collect(value: Container, path: Path, what: str, paths: list[Path], leaves: list[Any]) -> None:
    if _is_leaf(value):
        paths.append(path)
        leaves.append(value)
        return
    for key, child in _children(value, path, what):
        if not key:
            raise ValueError(f"{what} has an empty key; expected a name")
        if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
            raise ValueError(f"{what} has the key {brief(key)}, which holds a lone surrogate; expected text")
        _collect(child, (*path, key), what, paths, leaves)


def _children(value: Container, path: Path, what: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if _is_refused(value):
        where = f"{what} at {brief('/'.join(path))}" if path else what
        if isinstance(value, Set):
            raise TypeError(f"{where} is a {type(value).__name__}, which has no order; expected a dict or a list")
        raise TypeError(f"{where} is {brief(value)} of type {type(value).__name__}; {advice(value)}")
    items = list(value)
    if _are_pairs(items):
        return items
    return [(str(index), child) for index, child in enumerate(items)]


def _rebuild(value: Container, take: Callable[[], Any]) -> Container:
    if _is_leaf(value):
        return take()
    if isinstance(value, Mapping):
        return {key: _rebuild(child, take) for key, child in value.items()}
    items = list(value)
    if _are_pairs(items):
        return [(name, _rebuild(child, take)) for name, child in items]
    return [_rebuild(child, take) for child in items]
