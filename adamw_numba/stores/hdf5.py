"""`.h5`: a dataset per array, with Fletcher-32, and a CRC-32 of the whole file ahead of it, in its user block."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .checksums import PIECE
from .files import CorruptFileError

_BLOCK = 512
_FLETCHER32 = 3


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written (mode ``"w"``) or read (``"r"``)."""
    h5py = library()
    if mode == "r":
        _verify(path)
    with h5py.File(path, mode, **({"userblock_size": _BLOCK} if mode == "w" else {})) as file:
        yield Group(file)
    if mode == "w":
        checksum = _checksum(path)
        with open(path, "r+b") as raw:
            raw.write(b"adamw_numba crc32 %08x\n" % checksum)


def library() -> Any:
    """The package h5py."""
    try:
        import h5py
    except ImportError:
        raise ImportError("a .h5 file needs the package h5py: pip install adamw_numba[hdf5]") from None
    return h5py


class Group:
    """An HDF5 group as a mapping: a key can be set again; links out of the file and filters are refused."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.where = str(getattr(getattr(group, "file", None), "filename", group))

    def keys(self) -> list[str]:
        """The names of what lies directly in the group."""
        return list(self.group.keys())

    def __len__(self) -> int:
        return len(self.group)

    def __setitem__(self, key: str, array: Any) -> None:
        array = np.asarray(array)
        if key in self.group:
            del self.group[key]
        if array.dtype.name == "bfloat16":
            self.set_bfloat16(key, array.view(np.uint16))
            return
        # A scalar and an array of nothing cannot be chunked, and so not be summed up.
        summed = {"fletcher32": True} if array.ndim and array.size else {}
        self.group.create_dataset(key, data=array, **summed)

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self[key] = bits
        self.group[key].attrs["bits"] = "bfloat16"

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        dataset = self._dataset(key)
        if dataset.attrs.get("dtype") == "bfloat16":  # as Keras writes it
            return np.asarray(dataset.astype(np.float32)[()])
        return np.asarray(dataset[()])

    def _dataset(self, key: str) -> Any:
        """A dataset whose bytes lie, all of them, in this file."""
        h5py, node = library(), self.group
        for part in key.split("/"):
            if not isinstance(node, h5py.Group) or part not in node:
                raise CorruptFileError(f"{self.where} lacks {key!r}; expected it among its datasets")
            link = node.get(part, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise CorruptFileError(f"{self.where}: {key!r} is a {type(link).__name__}; expected the data itself")
            node = node[part]
        if not isinstance(node, h5py.Dataset):
            raise CorruptFileError(f"{self.where}: {key!r} is a {type(node).__name__}; expected a dataset")
        self._check(key, node)
        return node

    def _check(self, key: str, dataset: Any) -> None:
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
        if dataset.is_virtual or dataset.external:
            raise CorruptFileError(f"{self.where}: {key!r} is virtual or external; expected data in this file")
        if set(filters) - {_FLETCHER32}:
            raise CorruptFileError(f"{self.where}: {key!r} has the HDF5 filters {filters}; expected plain bytes")
        if dataset.dtype.kind not in "biufcV" or dataset.dtype.hasobject or dataset.shape is None:
            raise CorruptFileError(f"{self.where}: {key!r} has dtype {dataset.dtype}; expected numbers")
        count = dataset.dtype.itemsize
        for size in dataset.shape:
            count *= int(size)
        if count > dataset.id.get_storage_size():
            raise CorruptFileError(
                f"{self.where}: {key!r} declares shape {dataset.shape}, {count} bytes; it has "
                f"{dataset.id.get_storage_size()}"
            )


def _checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        file.seek(_BLOCK)
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _verify(path: Path) -> None:
    """Compare a file with its checksum before HDF5 trusts its structure."""
    with open(path, "rb") as file:
        start = file.read(_BLOCK)
    found = re.match(rb"adamw_numba crc32 ([0-9a-f]{8})\n", start)
    if not found:
        raise CorruptFileError(f"{path} lacks the checksum in front of its data; expected a file saved by AdamW")
    if int(found[1], 16) != _checksum(path):
        raise CorruptFileError(f"{path} is damaged: its bytes do not have the checksum {found[1].decode()}")
