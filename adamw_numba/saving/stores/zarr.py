"""`.zarr`: a folder, a zip, or a URL. A save is a new generation beside the old; one small write makes it current.

A folder of many files cannot be replaced as a file is, and an object store has no rename at all. So every save goes
into a group of its own, the generation, whose name bears the mark of its writer. An attribute of the root names the
generation that counts. To change that attribute is one write of one small file. What a save that failed has left
is in nobody's way, and a later save removes it.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays.brief import brief
from . import MANIFEST
from .atomic import CorruptFileError, is_abandoned, replacing, sync, sync_tree, under_way
from .zips import checked_members

_CURRENT = "adamw_numba"  # the attribute of the root that names the generation
_OURS = re.compile(rf"{_CURRENT}\.(?P<mark>[^.]+\.\d+\.[0-9a-f]+)|[0-9a-f]{{32}}")  # generations
_CHUNK = 1 << 26  # bytes
_LONGEST = 255  # bytes that a file system takes as one name


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
    folder = _folder(target)
    before = _checked_root(target, folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()] if folder else []
    with under_way() as mark:
        generation = f"{_CURRENT}.{mark}"
        try:
            store = Group(_new_group(target, folder, generation))
            yield store
            if folder is not None and durable:
                sync_tree(folder / generation)
            store.check_complete()
            _make_current(target, folder, generation, durable)
        except BaseException:
            _discard(target, folder, generation)
            _remove_empty(missing)
            raise
        with suppress(OSError, KeyError):  # what fails now is left for the next save to clear away
            _clear(target, folder, before)


def _new_group(target: Any, folder: Path | None, generation: str) -> Any:
    """The group of a new generation.

    In a folder it is made as a store of its own. As a path within the root, zarr would first make a root that names no
    generation, and a save that fails would leave it behind.
    """
    place: dict[str, Any] = {"store": target, "path": generation} if folder is None else {"store": folder / generation}
    return library().open_group(**place, mode="w", zarr_format=3)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that a failed save has made, unless another process has put something into them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def exists(target: Any) -> bool:
    """Whether there is a group at a URL."""
    try:
        library().open_group(target, mode="r")
    except FileNotFoundError:
        return False
    return True


def _checked_root(target: Any, folder: Path | None) -> str | None:
    """The generation that is current before a save; a place that holds the user's own data is refused."""
    attributes = _attributes(target)
    foreign = [name for name in _members(target, folder) if not _OURS.fullmatch(name)]
    if foreign and _CURRENT not in attributes:
        raise ValueError(
            f"`target` {target} holds {brief(sorted(foreign)[:5])} and lacks the attribute {_CURRENT!r}; expected an "
            "empty place, or one in which AdamW has saved before"
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
    """Remove a generation that has not become current; where nobody can tell, remove nothing."""
    with suppress(Exception):
        if _attributes(target).get(_CURRENT) != generation:
            _remove(target, folder, generation)


def _clear(target: Any, folder: Path | None, before: str | None) -> None:
    """Remove the generation that was current before, and those whose writer is gone: never the current one."""
    old = [name for name in _members(target, folder) if _is_old(target, name, before)]
    # In this order: what another writer has made current since the members were listed is seen here.
    current = _attributes(target).get(_CURRENT)
    for name in old:
        if name != current:
            _remove(target, folder, name)


def _is_old(target: Any, name: str, before: str | None) -> bool:
    found = _OURS.fullmatch(name)
    if not found:
        return False
    if found["mark"] is None:  # of an older version; others might give such a name to data of their own
        return library().open_group(target, mode="r").get(f"{name}/{MANIFEST}") is not None
    return name == before or is_abandoned(found["mark"])


@contextmanager
def reading(target: Any) -> Iterator[Any]:
    """A mapping over the generation that is current."""
    zarr = library()
    folder = _folder(target)
    if folder is not None and not folder.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
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


def short(key: str) -> str:
    """A key whose every part a file system takes as a name: the head of a longer one, ``=``, and its SHA-256.

    The document names the array in full. No percent-encoded name holds ``=``, so a short key is never another's.
    """
    return "/".join(part if len(part.encode()) <= _LONGEST else _hashed(part) for part in key.split("/"))


def _hashed(part: str) -> str:
    return f"{part[:100]}={hashlib.sha256(part.encode()).hexdigest()}"


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
        array, key = np.asarray(array), short(key)
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
            raise FileNotFoundError(
                f"{self.where} has lost {brief(lost[:5])} while it was written: somebody has removed them"
            )

    def _find(self, key: str) -> Any:
        """What lies at a key, or None; earlier versions did not shorten names, where there was no need to."""
        found = self.group.get(short(key))
        if found is None and short(key) != key:
            with suppress(OSError):  # in a folder the full name is too long even to be looked for
                found = self.group.get(key)
        return found

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        array = self._find(key)
        if array is None or not hasattr(array, "nbytes_stored"):
            raise CorruptFileError(f"{self.where} lacks {brief(key)}; expected it among its arrays")
        fault = _fault(array)
        if fault:
            raise CorruptFileError(f"{self.where}: {brief(key)} {fault}")
        return np.asarray(array[...])


def _fault(array: Any) -> str | None:
    """What is wrong with a zarr array's description, told before memory is taken for it; None if all is well."""
    if array.compressors or array.filters:
        return "is compressed; expected plain bytes, as they were saved"
    if array.dtype.kind not in "biufcV" or array.dtype.hasobject:
        return f"has dtype {array.dtype}; expected numbers"
    count, stored = array.dtype.itemsize * math.prod(array.shape), array.nbytes_stored()
    if count > stored or (0 in array.shape and max(array.shape) > 2**32):
        return f"declares shape {array.shape}, {count} bytes; it has {stored}"
    if any(chunk > max(size, 1) for chunk, size in zip(array.chunks, array.shape, strict=True)):
        return f"declares chunks {array.chunks} for shape {array.shape}"
    return None


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
