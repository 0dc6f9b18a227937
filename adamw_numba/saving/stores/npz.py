"""`.npz`: an uncompressed zip of `.npy` files and one of JSON.

Every array has two checksums: its own, which the JSON holds, and that of its member of the zip, which covers the
`.npy` header as well. A small array is summed up twice. A large one is read once, and the second sum computed from the
first.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays.brief import brief
from . import MANIFEST, zips
from .atomic import CorruptFileError
from .checksums import PIECE, joined

_LONGEST_HEADER = 10_000
_MAGIC = b"\x93NUMPY\x01\x00"


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written (mode ``"w"``) or read (``"r"``)."""
    with open(path, f"{mode}b") as file:
        if mode == "r":
            yield Reader(file, path)
            return
        archive = zips.Writer(file)
        yield Writer(archive)
        archive.close()


class Writer:
    """What is put in goes straight to the file."""

    def __init__(self, archive: zips.Writer) -> None:
        self.archive = archive
        self.checksums: dict[str, int] = {}

    def __setitem__(self, key: str, array: np.ndarray[Any, Any]) -> None:
        if key == MANIFEST:
            self.archive.add(key, array.tobytes())
            return
        header, name = _header(array.dtype, array.shape), f"{key}.npy"
        if array.nbytes > PIECE:
            self.checksums[key] = self.archive.add_array(name, header, array)
            return
        data = array.tobytes()
        self.checksums[key] = zlib.crc32(data)
        self.archive.add(name, header + data)

    def crc32(self, key: str) -> int:
        """The checksum of an array that was written."""
        return self.checksums[key]


class Reader:
    """What is taken out is read there and then; its header and its checksum are verified."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.where = file, str(path)
        with zipfile.ZipFile(file) as archive:
            self.members = zips.checked_members(archive, self.where)
        self.checksums: dict[str, int] = {}

    def keys(self) -> list[str]:
        """The names of the arrays, and of the JSON."""
        return [name.removesuffix(".npy") for name in self.members]

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        name = key if key == MANIFEST else f"{key}.npy"
        info = self.members.get(name)
        if info is None:
            raise CorruptFileError(f"{self.where} lacks {brief(name)}; expected it among its members")
        zips.go_to(self.file, info, self.where)
        return self._document(info) if key == MANIFEST else self._array(key, info)

    def _document(self, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
        data = self.file.read(info.file_size)
        zips.check_crc(zlib.crc32(data), info, self.where)
        return np.frombuffer(data, np.uint8)

    def _array(self, key: str, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
        header = self.file.read(len(_MAGIC) + 2)
        if header[:-2] != _MAGIC:
            raise CorruptFileError(f"{self.where}: {brief(info.filename)} is no .npy file of version 1.0")
        header += self.file.read(int.from_bytes(header[-2:], "little"))
        # Nothing is allocated before the header is known to declare the bytes that are there.
        array = np.empty(*_checked(header, info, self.where))
        memory: Any = array.reshape(-1).view(np.uint8)
        self.checksums[key] = crc = self._fill(memory, info)
        start = zlib.crc32(header)
        large = len(memory) > PIECE
        zips.check_crc(joined(start, crc, len(memory)) if large else zlib.crc32(memory, start), info, self.where)
        return array

    def _fill(self, memory: Any, info: zipfile.ZipInfo) -> int:
        """Read the bytes of an array into it, and sum them up on the way."""
        crc = 0
        for start in range(0, len(memory), PIECE):
            piece = memory[start : start + PIECE]
            if self.file.readinto(piece) != len(piece):
                raise CorruptFileError(
                    f"{self.where}: {brief(info.filename)} ends after {start} of {len(memory)} bytes"
                )
            crc = zlib.crc32(piece, crc)
        return crc

    def crc32(self, key: str) -> int:
        """The checksum of an array that was read, of the bytes that are in it now."""
        return self.checksums[key]


@lru_cache(256)  # a state has thousands of arrays of few shapes
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


@lru_cache(256)
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header[len(_MAGIC) :])
    return np.lib.format.read_array_header_1_0(stream, max_header_size=_LONGEST_HEADER)


def _checked(header: bytes, info: zipfile.ZipInfo, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a `.npy` header, whose size must be that of the member."""
    try:
        shape, fortran, dtype = _parsed(header)
    except MemoryError as error:  # of Python's parser, at an expression that is nested too deep
        raise CorruptFileError(
            f"{where}: {brief(info.filename)} has a header that cannot be parsed: {error}"
        ) from error
    if dtype.hasobject:
        raise CorruptFileError(f"{where}: {brief(info.filename)} holds Python objects (a pickle); expected numbers")
    if dtype.kind not in "biufcV" or fortran or (shape and min(shape) < 0):
        raise CorruptFileError(
            f"{where}: {brief(info.filename)} has dtype {dtype}, shape {shape}; expected plain numbers"
        )
    count = dtype.itemsize * math.prod(shape)
    if len(header) + count != info.file_size or (0 in shape and max(shape) > info.file_size + 2**32):
        raise CorruptFileError(
            f"{where}: {brief(info.filename)} declares {dtype} of shape {shape}, {count} bytes; it has "
            f"{info.file_size - len(header)}"
        )
    return shape, dtype
