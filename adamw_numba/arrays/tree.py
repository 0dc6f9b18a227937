"""Nested containers of arrays as one flat list of names and arrays, and back.

Dicts, lists, tuples and named tuples are known here, lists of ``(name, array)`` pairs, and other mappings; what JAX has
been told of, as equinox's modules and flax's states, is taken apart and put together by JAX, where that is loaded.
"""

import copy
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from array_api_compat import is_jax_array

from . import are_arrays, is_array
from .advice import advice
from .brief import brief, brief_names

Container = Any
Path = tuple[str, ...]
_BY_KEY, _BY_POSITION = (dict, OrderedDict), (list, tuple)


class Node(NamedTuple):
    """One level of a container."""

    keys: Sequence[Any]
    children: Sequence[Any]
    make: Callable[[Iterable[Any]], Container]  # of other children, a container of the same type


def node_of(value: Container) -> Node | None:
    """A container taken apart, by one level; None for what is none, or cannot be walked in a certain order."""
    kind: Any = type(value)
    if kind in _BY_KEY:
        return Node(list(value), list(value.values()), lambda children: kind(zip(value, children, strict=True)))
    if kind in _BY_POSITION and not _are_pairs(value):
        return Node(range(len(value)), value, kind)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return Node(kind._fields, value, kind._make)
    if kind not in (list, tuple, defaultdict) and (registered := _registered(value)):
        return registered
    if isinstance(value, Mapping):
        return Node(list(value), list(value.values()), partial(_mapping, value))
    if _is_refused(value):
        return None
    items = list(value)
    kind = tuple if kind is tuple else list
    if _are_pairs(items):
        keys = [key for key, _ in items]
        return Node(keys, [child for _, child in items], lambda children: kind(zip(keys, children, strict=True)))
    return Node(range(len(items)), items, kind)


def _mapping(value: Mapping[Any, Any], children: Iterable[Any]) -> Mapping[Any, Any]:
    """A mapping of the same type, or a dict where that cannot be made from it."""
    items = dict(zip(value, children, strict=True))
    if isinstance(value, dict):  # a copy of another mapping may share with it what it is written into
        with suppress(Exception):
            new: Any = copy.copy(value)
            new.update(items)
            if type(new) is type(value) and list(new) == list(items) and all(new[key] is items[key] for key in items):
                return new
    return items


def _registered(value: Any) -> Node | None:
    """What JAX has been told how to take apart; None for anything else, and where JAX is not loaded."""
    tree_util = getattr(sys.modules.get("jax"), "tree_util", None)
    if tree_util is None or isinstance(value, Iterator):  # which JAX has said it will refuse
        return None
    children, structure = tree_util.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    if tree_util.treedef_is_leaf(structure):
        return None
    keys = [tree_util.keystr(path, simple=True, separator="/") for path, _ in children]
    return Node(keys, [child for _, child in children], partial(tree_util.tree_unflatten, structure))


def flatten(container: Container, what: str = "variables", absent: bool = False) -> tuple[list[str], list[Any]]:
    """The names and the leaves of a container, in order: the keys that lead to a leaf, joined by ``/``.

    A list's entries have the keys ``0``, ``1``, ... A key may hold ``/`` itself, as the names of Keras and Haiku do.

    Parameters
    ----------
    container : array, dict, list, tuple, iterable of ``(str, array)`` pairs, or a nesting of these
    what : str
        What errors call the container.
    absent : bool
        Whether ``None`` counts as a leaf: a gradient that does not exist. Otherwise it is skipped.

    Raises
    ------
    TypeError
        If a leaf is no array.
    ValueError
        If a key is empty, two leaves have the same name, or a container holds itself.
    """
    paths, leaves = paths_of(container, what, absent)
    names = ["/".join(path) or "0" for path in paths]
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        raise ValueError(f"{what} holds the name {brief(twice)} more than once; expected every name once")
    return names, leaves


def paths_of(container: Container, what: str, absent: bool = False) -> tuple[list[Path], list[Any]]:
    """For each leaf of a container, in order, the keys that lead to it, and the leaf itself."""
    found: list[tuple[Path, Any]] = []
    with _not_too_deep(what):
        _collect(container, (), what, found)
    found = found if absent else [pair for pair in found if pair[1] is not None]
    return [path for path, _ in found], [leaf for _, leaf in found]


def in_jax_order(container: Container, names: list[str], leaves: list[Any]) -> tuple[list[str], list[Any]]:
    """Names and leaves of a container in the order that JAX gives them: under a trace a dict comes with sorted keys.

    Those of other libraries stay in the order of the container.
    """
    if not any(map(is_jax_array, leaves)):
        return names, leaves
    order = sys.modules["jax"].tree.leaves(rebuild(container, range(len(leaves))))
    order = [position for position in order if isinstance(position, int)]  # not the names of pairs
    return [names[position] for position in order], [leaves[position] for position in order]


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
    elif (kind in _BY_POSITION and not _are_pairs(value)) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
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
    """A container of the same types and shape with other leaves; None stays where it was."""
    if type(container) is dict and are_arrays(container.values()):  # many
        return dict(zip(container, leaves, strict=True))
    return _rebuild(container, iter(leaves).__next__)


def materialized(container: Container, what: str) -> Container:
    """A container of the same leaves that can be walked twice, and that nobody else changes meanwhile.

    What is only walked, as a generator is, becomes a list.
    """
    with _not_too_deep(what):
        return _materialized(container)


def matched(container: Container, expected: list[str], what: str, may_be_empty: bool = False) -> list[Any]:
    """The leaves of a container in the order of the expected names; or none at all, where that is fine.

    None is a leaf where a name is expected, and is skipped elsewhere.

    Raises
    ------
    ValueError
        If a count or a name differs.
    """
    container = materialized(container, what)
    names, leaves = flatten(container, what, absent=True)
    if may_be_empty and not leaves:
        return []
    if len(names) > len(expected):
        known = set(expected)
        kept = [pair for pair in zip(names, leaves, strict=True) if pair[1] is not None or pair[0] in known]
        names, leaves = [name for name, _ in kept], [leaf for _, leaf in kept]
    return [leaves[i] for i in order(container, names, expected, what)]


def order(container: Container, names: list[str], expected: list[str], what: str) -> list[int]:
    """Where each expected name's leaf is among those of a container: by position in a flat list, else by name."""
    fields = getattr(container, "_fields", None)
    positional = names == list(map(str, fields or range(len(names)))) and not _has_keys(container)
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
    if _is_leaf(value):
        return value
    node = node_of(value)
    return value if node is None else node.make([_materialized(child) for child in node.children])


def _is_refused(value: object) -> bool:
    """What cannot be walked, or has no certain order, or holds keys and is no mapping, or numbers and no arrays."""
    if isinstance(value, (str, bytes, bytearray, memoryview)) or not isinstance(value, Iterable):
        return True
    if isinstance(value, Set):
        return not isinstance(value, (KeysView, ItemsView))
    return not isinstance(value, Mapping) and (hasattr(value, "keys") or hasattr(value, "to_numpy"))


def _collect(value: Container, path: Path, what: str, found: list[tuple[Path, Any]]) -> None:
    if _is_leaf(value):
        found.append((path, value))
        return
    node = node_of(value)
    if node is None:
        where = f"{what} at {brief('/'.join(path))}" if path else what
        if isinstance(value, Set):
            raise TypeError(f"{where} is a {type(value).__name__}, which has no order; expected a dict or a list")
        raise TypeError(f"{where} is {brief(value)} of type {type(value).__name__}; {advice(value)}")
    for key, child in zip(map(str, node.keys), node.children, strict=True):
        if not key:
            raise ValueError(f"{what} has an empty key; expected a name")
        if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
            raise ValueError(f"{what} has the key {brief(key)}, which holds a lone surrogate; expected text")
        _collect(child, (*path, key), what, found)


def _rebuild(value: Container, take: Callable[[], Any]) -> Container:
    if value is None:
        return None
    node = None if is_array(value) else node_of(value)
    return take() if node is None else node.make([_rebuild(child, take) for child in node.children])
