"""`.npz`: an uncompressed zip of `.npy` files and one of JSON. The zip's own CRCs are the arrays' checksums."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import CorruptFileError
from .checksums import PIECE, pieces, shifted

MANIFEST = "manifest.json"
_MOST_MEMBERS = 4_000_000
_LONGEST_HEADER = 10_000


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written (mode ``"w"``) or read (``"r"``)."""
    with open(path, f"{mode}b") as file, zipfile.ZipFile(file, mode) as archive:  # type: ignore[call-overload]
        yield Reader(archive, path) if mode == "r" else Writer(archive)


class Writer:
    """What is put in goes straight to the file, piece by piece."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.checksums: dict[str, int] = {}

    def __setitem__(self, key: str, array: np.ndarray[Any, Any]) -> None:
        if key == MANIFEST:
            self.archive.writestr(zipfile.ZipInfo(key), array.tobytes())
            return
        info, header = zipfile.ZipInfo(f"{key}.npy"), _header(array)
        with self.archive.open(info, "w", force_zip64=True) as member:
            member.write(header)
            for piece in pieces(array):
                member.write(piece)
        self.checksums[key] = info.CRC ^ shifted(zlib.crc32(header), array.nbytes)

    def crc32(self, key: str) -> int:
        """The checksum of an array that has been written, for nothing."""
        return self.checksums[key]


class Reader:
    """What is taken out is read there and then; its header and its checksum are verified."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive = archive
        self.where = str(path)
        self.members = checked_members(archive, self.where)
        self.checksums: dict[str, int] = {}

    def keys(self) -> list[str]:
        """The names of the arrays, and of the JSON."""
        return [name.removesuffix(".npy") for name in self.members]

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        name = key if key == MANIFEST else f"{key}.npy"
        if name not in self.members:
            raise CorruptFileError(f"{self.where} lacks {name!r}; expected it among its members")
        info = self.members[name]
        with self.archive.open(info) as member:
            if key == MANIFEST:
                return np.frombuffer(member.read(), np.uint8)
            shape, dtype, header = _read_header(member, info, self.where)
            array = np.empty(shape, dtype)
            _fill(array, member, f"{self.where}: {name}")
        self.checksums[key] = info.CRC ^ shifted(zlib.crc32(header), array.nbytes)
        return array

    def crc32(self, key: str) -> int:
        """The checksum of an array that has been read: the zip's own, which has been compared with its bytes."""
        return self.checksums[key]


def checked_members(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name; names that leave the folder, doubles, compression and impossible sizes refused."""
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise CorruptFileError(f"{where} has {len(infos)} members; expected at most {_MOST_MEMBERS}")
    members: dict[str, zipfile.ZipInfo] = {}
    size = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]
    for info in infos:
        name = info.orig_filename
        if name.startswith(("/", "\\")) or ":" in name or "\0" in name or ".." in name.replace("\\", "/").split("/"):
            raise CorruptFileError(f"{where} has the member {name!r}, whose name leads out of the file's own folder")
        if name in members:
            raise CorruptFileError(f"{where} has the member {name!r} more than once; expected every name once")
        if info.flag_bits & 1:
            raise CorruptFileError(f"{where}: {name!r} is encrypted; expected plain bytes")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CorruptFileError(f"{where}: {name!r} is compressed; expected plain bytes, as they were saved")
        members[name] = info
        if not 0 <= info.header_offset <= info.header_offset + info.file_size <= size:
            raise CorruptFileError(f"{where}: {name!r} is said to lie beyond the end of the file, {size} bytes")
    declared = sum(info.file_size for info in infos)
    if declared > size:
        raise CorruptFileError(f"{where} declares members of {declared} bytes together; it has {size}")
    return members


def _header(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _read_header(member: Any, info: zipfile.ZipInfo, where: str) -> tuple[tuple[int, ...], np.dtype[Any], bytes]:
    """Shape, dtype and raw bytes of a `.npy` header, whose size must be that of the member."""
    start = member.read(10)
    if start[:8] != b"\x93NUMPY\x01\x00":
        raise CorruptFileError(f"{where}: {info.filename!r} is no .npy file of version 1.0")
    header = start + member.read(int.from_bytes(start[8:], "little"))
    stream = io.BytesIO(header[8:])
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_LONGEST_HEADER)
    except MemoryError as error:  # of Python's parser, at an expression that is nested too deep
        raise CorruptFileError(f"{where}: {info.filename!r} has a header that cannot be parsed: {error}") from error
    if dtype.hasobject:
        raise CorruptFileError(f"{where}: {info.filename!r} holds Python objects (a pickle); expected numbers")
    if dtype.kind not in "biufcV" or fortran or any(size < 0 for size in shape):
        raise CorruptFileError(f"{where}: {info.filename!r} has dtype {dtype}, shape {shape}; expected plain numbers")
    count = dtype.itemsize
    for size in shape:
        count *= size
    if len(header) + count != info.file_size or (0 in shape and max(shape) > info.file_size + 2**32):
        raise CorruptFileError(
            f"{where}: {info.filename!r} declares {dtype} of shape {shape}, {count} bytes; it has "
            f"{info.file_size - len(header)}"
        )
    return shape, dtype, header


def _fill(array: np.ndarray[Any, Any], member: Any, where: str) -> None:
    memory: Any = array.reshape(-1).view(np.uint8)
    for start in range(0, len(memory), PIECE):
        piece = memory[start : start + PIECE]
        if member.readinto(piece) != len(piece):
            raise CorruptFileError(f"{where} ends after {start} of {len(memory)} bytes")
    member.read(1)  # at the end the zip's checksum is compared
