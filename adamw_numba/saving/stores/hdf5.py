"""`.h5`: a dataset per array, with Fletcher-32, and a CRC-32 of the whole file in front of it, in its user block.

Fletcher-32 covers the bytes of the arrays. It does not cover the structure of the file, and HDF5 follows a damaged
structure wherever it leads: into crashes, endless loops and other people's data. So the whole file is summed up before
HDF5 sees it. The user block is a place in front of the data that HDF5 leaves to others.
"""

import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays.brief import brief
from .atomic import CorruptFileError
from .checksums import PIECE

_BLOCK = 512
_FLETCHER32 = 3


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written (mode ``"w"``) or read (``"r"``)."""
    h5py = library()
    if mode == "r":
        _verify(path)
        with h5py.File(path, "r") as file:
            yield Group(file)
        return
    writer = Writer()
    yield writer
    _write_undisturbed(path, writer)
    checksum = _checksum(path)
    with open(path, "r+b") as end:
        end.write(b"adamw_numba crc32 %08x\n" % checksum)


def _write_undisturbed(path: Path, writer: "Writer") -> None:
    """Write in a thread of its own, where no signal arrives: HDF5 does not survive an exception in a write.

    The main thread waits in short pieces, since an interrupt is only noticed between them.
    """
    sink = Sink(open(path, "w+b", buffering=0))  # noqa: SIM115 - closed by the thread
    ended: list[BaseException | None] = []
    gate = threading.Lock()
    gate.acquire()
    threading.Thread(target=_write, args=(sink, writer, ended, gate), name="adamw_numba hdf5").start()
    while not ended:
        try:
            gate.acquire(timeout=1)
        except BaseException as error:
            sink.error = sink.error or error
    failure = sink.error or ended[0]
    if failure is not None:
        raise failure


def _write(sink: "Sink", writer: "Writer", ended: list[BaseException | None], gate: threading.Lock) -> None:
    failure: BaseException | None = None
    try:
        with sink.file, library().File(sink, "w", userblock_size=_BLOCK) as file:
            group = Group(file)
            for key, (put, array) in writer.arrays.items():
                if sink.error is None:
                    put(group, key, array)
    except BaseException as error:
        failure = error
    ended.append(failure)
    gate.release()


def library() -> Any:
    """The package h5py."""
    try:
        import h5py
    except ImportError:
        raise ImportError("a .h5 file needs the package h5py: pip install adamw_numba[hdf5]") from None
    return h5py


class Sink:
    """A file whose first failure is kept for later: HDF5 itself does not survive a write that fails."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        """Write all, or nothing more after a failure."""
        left = memoryview(data).cast("B")
        count = len(left)
        while len(left) and self.error is None:
            try:
                left = left[self.file.write(left) :]
            except BaseException as error:
                self.error = error
        return count

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or nothing more after a failure."""
        try:
            return int(self.file.truncate(size))
        except BaseException as error:
            self.error = self.error or error
            return size or 0


class Writer:
    """Arrays held until all are written at once, each with the method that puts it in."""

    def __init__(self) -> None:
        self.arrays: dict[str, tuple[Any, Any]] = {}

    def __setitem__(self, key: str, array: np.ndarray[Any, Any]) -> None:
        self.arrays[key] = (Group.__setitem__, array)

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self.arrays[key] = (Group.set_bfloat16, bits)


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
        # HDF5 sums up chunks, and neither a scalar nor an empty array can have any.
        summed = {"fletcher32": True} if array.ndim and array.size else {}
        self.group.create_dataset(key, data=array, **summed)

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self[key] = bits
        self.group[key].attrs["bits"] = "bfloat16"

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        dataset = self._dataset(key)
        if dataset.attrs.get("dtype") == "bfloat16":  # as Keras writes it: two opaque bytes each
            bits = np.asarray(dataset[()]).view(np.uint16)
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(dataset[()])

    def below(self, key: str) -> "Group":
        """A group in this one, as a mapping of its own."""
        return Group(self._node(key))

    def _node(self, key: str) -> Any:
        """What lies at a path, without following a link."""
        h5py, node = library(), self.group
        for part in key.split("/"):
            if not isinstance(node, h5py.Group) or part not in node:
                raise CorruptFileError(f"{self.where} lacks {brief(key)}; expected it among its datasets")
            link = node.get(part, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise CorruptFileError(
                    f"{self.where}: {brief(key)} is a {type(link).__name__}; expected the data itself"
                )
            node = node[part]
        return node

    def _dataset(self, key: str) -> Any:
        """A dataset, all of whose bytes lie in this file."""
        h5py, node = library(), self._node(key)
        if not isinstance(node, h5py.Dataset):
            raise CorruptFileError(f"{self.where}: {brief(key)} is a {type(node).__name__}; expected a dataset")
        self._check(key, node)
        return node

    def _check(self, key: str, dataset: Any) -> None:
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
        if dataset.is_virtual or dataset.external:
            raise CorruptFileError(f"{self.where}: {brief(key)} is virtual or external; expected data in this file")
        if set(filters) - {_FLETCHER32}:
            raise CorruptFileError(f"{self.where}: {brief(key)} has the HDF5 filters {filters}; expected plain bytes")
        if dataset.dtype.kind not in "biufcV" or dataset.dtype.hasobject or dataset.shape is None:
            raise CorruptFileError(f"{self.where}: {brief(key)} has dtype {dataset.dtype}; expected numbers")
        count = dataset.dtype.itemsize
        for size in dataset.shape:
            count *= int(size)
        if count > dataset.id.get_storage_size():
            raise CorruptFileError(
                f"{self.where}: {brief(key)} declares shape {dataset.shape}, {count} bytes; it has "
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
