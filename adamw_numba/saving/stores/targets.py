"""Which store a target is: by its suffix, or by what it is."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ...arrays.brief import brief
from . import hdf5, npz, safetensors, zarr
from .atomic import naming, replacing

_OPENERS: dict[str, Any] = {
    ".npz": npz.opened,
    ".safetensors": safetensors.opened,
    ".h5": hdf5.opened,
    ".zarr.zip": zarr.opened,
}
_LIBRARIES = {".safetensors": safetensors.library, ".h5": hdf5.library, ".zarr.zip": zarr.library}


@contextmanager
def writing(target: Any, durable: bool) -> Iterator[Any]:
    """A mapping to put arrays into; what a path held before is replaced, whole, once the block has ended.

    Raises
    ------
    TypeError, ValueError
        If the target is neither a mapping nor a path with a suffix that is known.
    """
    if _is_zarr(target):
        with zarr.writing(target, durable) as store:
            yield store
    elif isinstance(target, (str, os.PathLike)):
        path = Path(target)
        opener = _opener(path)
        with replacing(path, durable) as temporary, opener(temporary, "w") as store:
            yield store
    else:
        yield adapted(target)


@contextmanager
def reading(target: Any) -> Iterator[Any]:
    """A mapping to take arrays from; errors name the file."""
    if _is_zarr(target):
        manager: AbstractContextManager[Any] = zarr.reading(target)
    elif isinstance(target, (str, os.PathLike)):
        path = Path(target)
        opener = _opener(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; expected a file")
        manager = opener(path, "r")
    else:
        yield adapted(target)
        return
    with naming(str(target)), manager as store:
        yield store


def adapted(store: Any) -> Any:
    """A mapping of the user's as it is; an h5py or zarr group behind a thin adapter.

    Raises
    ------
    TypeError
        If it is no mapping.
    """
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(store).__mro__}
    if "h5py.Group" in kinds:
        return hdf5.Group(store)
    if "zarr.Group" in kinds:
        return zarr.Group(store)
    if not (hasattr(store, "__setitem__") or hasattr(store, "__getitem__")) or not hasattr(store, "keys"):
        raise TypeError(
            f"`target` is {brief(store)} of type {type(store).__name__}; expected a path, a URL, or a mapping"
        )
    return store


def is_mapping(target: Any) -> bool:
    """Whether a target is an object that arrays are put into, rather than the name of a place."""
    return not _is_zarr(target) and not isinstance(target, (str, os.PathLike))


def _is_zarr(target: Any) -> bool:
    if isinstance(target, (str, os.PathLike)):
        text = os.fspath(target)
        if isinstance(text, str) and not isinstance(target, str):
            check_no_url("target", text)
        return isinstance(text, str) and ("://" in text or text.rstrip("/").endswith(".zarr"))
    return any(f"{kind.__module__}.{kind.__name__}" == "zarr.abc.store.Store" for kind in type(target).__mro__)


def _opener(path: Path) -> Any:
    """What opens a path of this suffix, ours or a third party's."""
    if path.name.endswith((".weights.h5", ".keras")):
        raise ValueError(
            f"{path} has the suffix of Keras's own files; expected another, or `interop.from_keras`, `interop.to_keras`"
        )
    for suffix, opener in _OPENERS.items():
        if path.name.endswith(suffix):
            return opener
    plugs = {f".{point.name}": point for point in entry_points(group="adamw_numba.stores")}
    for suffix, point in plugs.items():
        if path.name.endswith(suffix):
            return point.load()
    known = ", ".join([*_OPENERS, ".zarr", *plugs])
    raise ValueError(
        f"{brief(str(path))} has no suffix that is known; expected one of {known}, or a URL of a zarr store"
    )


def exists(target: Any) -> bool:
    """Whether a path or a URL holds anything already."""
    if _is_zarr(target) and "://" in os.fspath(target):
        return zarr.exists(target)
    return os.path.lexists(target)


def check_no_url(what: str, text: str) -> None:
    """Refuse a URL where a path in the file system is expected; a `Path` has lost one of its slashes.

    Raises
    ------
    ValueError
    """
    if "://" in text or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(f"`{what}` is {brief(text)}, a URL; expected a path, or for a save the URL as a string")


def check_target(target: Any) -> None:
    """Refuse what `writing` would refuse, before there is anything to write; also where a package is missing."""
    if is_mapping(target):
        adapted(target)
    elif _is_zarr(target):
        zarr.library()
    else:
        _opener(Path(target))
        for suffix, library in _LIBRARIES.items():
            if str(target).endswith(suffix):
                library()
