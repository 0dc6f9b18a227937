"""`.zarr`: a folder, a zip, or a URL. A save is a new generation beside the old; one small write makes it current."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import CorruptFileError, is_abandoned, replacing, sync, sync_tree, under_way
from .npz import MANIFEST, checked_members

_CURRENT = "adamw_numba"  # the attribute of the root that names the generation
_OURS = re.compile(rf"{_CURRENT}\.(?P<mark>[^.]+\.\d+\.[0-9a-f]+)|[0-9a-f]{{32}}")  # generations
_CHUNK = 1 << 26  # bytes


def library() -> Any:
    """The package zarr."""
    try:
        import zarr
        import zarr.storage
    except ImportError:
        raise ImportError("zarr stores and URLs need the package zarr: pip install adamw_numba[zarr]") from None
    return zarr


@contextmanager
def writing(target: Any, durable: bool) -> Iterator[Any]:
    """A mapping whose arrays replace what a folder, a URL or a zarr store holds, once the block has ended."""
    zarr, folder = library(), _folder(target)
    before = _checked_root(target, folder)
    with under_way() as mark:
        generation = f"{_CURRENT}.{mark}"
        try:
            store = Group(zarr.open_group(target, path=generation, mode="w", zarr_format=3))
            yield store
            if folder is not None and durable:
                sync_tree(folder / generation)
            store.check_complete()
            _make_current(target, folder, generation, durable)
        except BaseException:
            _discard(target, folder, generation)
            raise
        with suppress(OSError, KeyError):  # what fails now is left for the next save to clear away
            _clear(target, folder, before)


def _checked_root(target: Any, folder: Path | None) -> str | None:
    """The generation that is current before a save; a place that holds the user's own data is refused."""
    attributes = _attributes(target)
    foreign = [name for name in _members(target, folder) if not _OURS.fullmatch(name)]
    if foreign and _CURRENT not in attributes:
        raise ValueError(
            f"`target` {target} holds {sorted(foreign)[:5]} and lacks the attribute {_CURRENT!r}; expected an empty "
            "place, or one in which AdamW has saved before"
        )
    return attributes.get(_CURRENT)


def _attributes(target: Any) -> dict[str, Any]:
    """The attributes of the root; none where there is no root."""
    try:
        return dict(library().open_group(target, mode="r", zarr_format=3).attrs)
    except FileNotFoundError:
        return {}


def _members(target: Any, folder: Path | None) -> list[str]:
    """What lies in the root, half removed generations included."""
    if folder is not None:
        found = os.listdir(folder) if folder.is_dir() else []
        return [
            name for name in found if name != "zarr.json" and not name.startswith(".") and not name.endswith(".partial")
        ]
    try:
        return list(library().open_group(target, mode="r", zarr_format=3).keys())
    except FileNotFoundError:
        return []


def _discard(target: Any, folder: Path | None, generation: str) -> None:
    """Remove a generation that has not become current; where that cannot be told, nothing."""
    with suppress(Exception):
        if _attributes(target).get(_CURRENT) != generation:
            _remove(target, folder, generation)


def _clear(target: Any, folder: Path | None, before: str | None) -> None:
    """Remove the generation that was current before, and those whose writer is gone: never the current one."""
    old = [name for name in _members(target, folder) if _is_old(target, name, before)]
    # Read after it was found out who lives: what a writer has made current meanwhile is seen here.
    current = _attributes(target).get(_CURRENT)
    for name in old:
        if name != current:
            _remove(target, folder, name)


def _is_old(target: Any, name: str, before: str | None) -> bool:
    found = _OURS.fullmatch(name)
    if not found:
        return False
    if found["mark"] is None:  # a name that others might give to their data
        return library().open_group(target, mode="r").get(f"{name}/{MANIFEST}") is not None
    return name == before or is_abandoned(found["mark"])


@contextmanager
def reading(target: Any) -> Iterator[Any]:
    """A mapping over the generation that is current."""
    zarr = library()
    folder = _folder(target)
    if folder is not None and not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    try:
        root = zarr.open_group(target, mode="r", zarr_format=3)
    except FileNotFoundError as error:
        if folder is None:
            raise
        raise CorruptFileError(f"{folder} holds no zarr group; expected one saved by AdamW") from error
    yield _current(root, target)


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a zip that is written (mode ``"w"``) or read (``"r"``)."""
    import zipfile

    zarr = library()
    if mode == "r":
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            checked_members(archive, str(path))
    with zarr.storage.ZipStore(path, mode=mode) as store:
        if mode == "r":
            yield _current(zarr.open_group(store, mode="r", zarr_format=3), path)
        else:
            yield Group(zarr.create_group(store, attributes={_CURRENT: ""}, zarr_format=3))


class Group:
    """A zarr group as a mapping; whole arrays, uncompressed, in chunks."""

    def __init__(self, group: Any, where: Any = None) -> None:
        self.group = group
        self.where = str(group.store if where is None else where)
        self.put: list[str] = []

    def keys(self) -> list[str]:
        """The names of what lies directly in the group."""
        return list(self.group.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __setitem__(self, key: str, array: Any) -> None:
        array = np.asarray(array)
        self.put.append(key)
        if array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        with suppress(KeyError):
            del self.group[key]
        stored = self.group.create_array(
            key,
            shape=array.shape,
            dtype=array.dtype,
            chunks=_chunks(array),
            compressors=None,
            filters=None,
            config={"write_empty_chunks": True},
        )
        if array.size:
            stored[...] = array

    def check_complete(self) -> None:
        """Refuse to go on where another has removed what was put in."""
        lost = [key for key in self.put if key not in self.group]
        if lost:
            raise FileNotFoundError(f"{self.where} has lost {lost[:5]} while it was written: somebody has removed them")

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        array = self.group.get(key)
        if array is None or not hasattr(array, "nbytes_stored"):
            raise CorruptFileError(f"{self.where} lacks {key!r}; expected it among its arrays")
        if array.compressors or array.filters:
            raise CorruptFileError(f"{self.where}: {key!r} is compressed; expected plain bytes, as they were saved")
        if array.dtype.kind not in "biufcV" or array.dtype.hasobject:
            raise CorruptFileError(f"{self.where}: {key!r} has dtype {array.dtype}; expected numbers")
        count = array.dtype.itemsize
        for size in array.shape:
            count *= int(size)
        if count > array.nbytes_stored() or (0 in array.shape and max(array.shape) > 2**32):
            raise CorruptFileError(
                f"{self.where}: {key!r} declares shape {array.shape}, {count} bytes; it has {array.nbytes_stored()}"
            )
        if any(chunk > max(size, 1) for chunk, size in zip(array.chunks, array.shape, strict=True)):
            raise CorruptFileError(f"{self.where}: {key!r} declares chunks {array.chunks} for shape {array.shape}")
        return np.asarray(array[...])


def _chunks(array: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """Whole rows, as many as fit."""
    chunks = [max(size, 1) for size in array.shape]
    for axis in range(array.ndim):
        if int(np.prod(chunks, dtype=object)) * array.itemsize <= _CHUNK:
            break
        rest = int(np.prod(chunks[axis + 1 :], dtype=object)) * array.itemsize
        chunks[axis] = max(1, min(chunks[axis], _CHUNK // rest))
    return tuple(chunks)


def _current(root: Any, target: Any) -> Group:
    name = root.attrs.get(_CURRENT)
    if not isinstance(name, str) or "/" in name or (name and name not in root):
        raise CorruptFileError(f"{target} names no current generation in its attribute {_CURRENT!r}")
    return Group(root[name] if name else root, target)


def _folder(target: Any) -> Path | None:
    """The folder of a local store, whose writes can be made durable."""
    if isinstance(target, (str, os.PathLike)):
        return None if "://" in str(target) else Path(target)
    root = getattr(target, "root", None)
    return root if isinstance(root, Path) else None


def _make_current(target: Any, folder: Path | None, generation: str, durable: bool) -> None:
    if folder is None:
        library().open_group(target, mode="r+").update_attributes({_CURRENT: generation})
        return
    attributes = _attributes(target) | {_CURRENT: generation}
    root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    with replacing(folder / "zarr.json", durable) as temporary:
        temporary.write_text(json.dumps(root, indent=2))
    if durable:
        sync(folder.parent)


def _remove(target: Any, folder: Path | None, generation: str) -> None:
    if folder is not None:
        shutil.rmtree(folder / generation)
    else:
        del library().open_group(target, mode="r+")[generation]
