"""Uncompressed zips: written member by member, with no more work than the format asks for, and read with suspicion.

`zipfile` reads the directory of a zip here. It does not write: for a small member its bookkeeping takes ten times as
long as the bytes, and it takes its own CRC of bytes whose CRC is known.
"""

import os
import struct
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from ...arrays.brief import brief
from .atomic import CorruptFileError
from .checksums import joined, pieces

_MOST_MEMBERS = 4_000_000
_LOCAL = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, CRC, two sizes, two lengths
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END, _END_64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CRC_OFFSET = 14  # of a local header
_LENGTHS = struct.Struct("<2H")  # of the name and the extra field, at 26
_LONGEST_NAME = 65_535  # bytes: its length is a field of two
_LIMIT = 0x7FFFFFFF  # sizes above it stand in fields of eight bytes: zip64
_MANY = 0xFFFF
_UTF8 = 0x800
_DATE = 33  # 1 January 1980: equal states are equal files
_MODE = 0o600 << 16


class Member(NamedTuple):
    """What the directory says of a member."""

    name: bytes
    crc: int
    size: int
    offset: int


class Writer:
    """Members one after another, and the directory at the end.

    Parameters
    ----------
    file : binary file
        At its start, and seekable.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.members: list[Member] = []
        self.position = 0

    def add(self, name: str, data: bytes) -> None:
        """Write a small member at once."""
        member = self._member(name, zlib.crc32(data), len(data))
        self._write(_local(member) + data)

    def add_array(self, name: str, header: bytes, array: np.ndarray[Any, Any]) -> int:
        """Write a large array behind a header, in pieces, each read once; the CRC-32 of the array alone.

        The CRC of the member stands in front of its bytes, and is written there when they are known.
        """
        member = self._member(name, 0, len(header) + array.nbytes)
        self._write(_local(member) + header)
        crc = 0
        for piece in pieces(array):
            crc = zlib.crc32(piece, crc)
            self._write(piece)
        whole = joined(zlib.crc32(header), crc, array.nbytes)
        self.members[-1] = member._replace(crc=whole)
        self.file.seek(member.offset + _CRC_OFFSET)
        self.file.write(whole.to_bytes(4, "little"))
        self.file.seek(self.position)
        return crc

    def close(self) -> None:
        """Write the directory, which makes a zip of what was written."""
        start = self.position
        directory = b"".join(map(_central, self.members))
        self._write(directory + _end(len(self.members), len(directory), start))

    def _member(self, name: str, crc: int, size: int) -> Member:
        text = name.encode()
        if len(text) > _LONGEST_NAME:
            raise ValueError(f"the name {brief(name)} has {len(text)} bytes in a zip; expected at most {_LONGEST_NAME}")
        member = Member(text, crc, size, self.position)
        self.members.append(member)
        return member

    def _write(self, data: Any) -> None:
        self.file.write(data)
        self.position += len(data)


def _local(member: Member) -> bytes:
    """What stands in front of a member's bytes."""
    (compressed, size), extra = _wide(member.size, member.size)
    head = _common(member, extra)
    return _LOCAL.pack(b"PK\3\4", *head, compressed, size, len(member.name), len(extra)) + member.name + extra


def _central(member: Member) -> bytes:
    """A member's entry in the directory."""
    (compressed, size, offset), extra = _wide(member.size, member.size, member.offset)
    head = _common(member, extra)
    lengths = len(member.name), len(extra), 0
    made_by = 3 << 8 | head[0]  # Unix, so that the mode counts
    return (
        _CENTRAL.pack(b"PK\1\2", made_by, *head, compressed, size, *lengths, 0, 0, _MODE, offset) + member.name + extra
    )


def _common(member: Member, extra: bytes) -> tuple[int, ...]:
    """Version, flags, method, time, date and CRC: the same in both headers."""
    return 45 if extra else 20, 0 if member.name.isascii() else _UTF8, zipfile.ZIP_STORED, 0, _DATE, member.crc


def _wide(*numbers: int) -> tuple[tuple[int, ...], bytes]:
    """Fields of four bytes, and the extra field with those numbers that need eight."""
    large = [number for number in numbers if number > _LIMIT]
    if not large:
        return numbers, b""
    fields = tuple(0xFFFFFFFF if number > _LIMIT else number for number in numbers)
    return fields, struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large)


def _end(count: int, size: int, start: int) -> bytes:
    """What a reader looks for first, at the end of the file."""
    wide = b""
    if count >= _MANY or max(size, start) > _LIMIT:
        wide = _END_64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        wide += _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
        count, size, start = min(count, _MANY), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
    return wide + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)


def checked_members(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name; names that leave the folder, doubles, compression and impossible sizes refused."""
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise CorruptFileError(f"{where} has {len(infos)} members; expected at most {_MOST_MEMBERS}")
    members: dict[str, zipfile.ZipInfo] = {}
    end = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]
    for info in infos:
        if info.orig_filename in members:
            raise CorruptFileError(
                f"{where} has the member {brief(info.orig_filename)} more than once; expected every name once"
            )
        _check_member(info, end, where)
        members[info.orig_filename] = info
    declared = sum(info.file_size for info in infos)
    if declared > end:
        raise CorruptFileError(f"{where} declares members of {declared} bytes together; it has {end}")
    return members


def _check_member(info: zipfile.ZipInfo, end: int, where: str) -> None:
    name = info.orig_filename
    if name.startswith(("/", "\\")) or ":" in name or "\0" in name or _climbs(name):
        raise CorruptFileError(f"{where} has the member {brief(name)}, whose name leads out of the file's own folder")
    if info.flag_bits & 1:
        raise CorruptFileError(f"{where}: {brief(name)} is encrypted; expected plain bytes")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CorruptFileError(f"{where}: {brief(name)} is compressed; expected plain bytes, as they were saved")
    if not 0 <= info.header_offset <= info.header_offset + info.file_size <= end:
        raise CorruptFileError(f"{where}: {brief(name)} is said to lie beyond the end of the file, {end} bytes")


def _climbs(name: str) -> bool:
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def go_to(file: Any, info: zipfile.ZipInfo, where: str) -> None:
    """Move to the first byte of a member; what stands in front of it must bear the same name.

    Only the name is compared: sizes and CRC are taken from the directory, and a header that lies about the lengths of
    its own fields leads to other bytes, whose CRC is wrong.
    """
    file.seek(info.header_offset)
    start = file.read(_LOCAL.size)
    if len(start) < _LOCAL.size or start[:4] != b"PK\3\4":
        raise CorruptFileError(f"{where}: {brief(info.orig_filename)} does not begin where the zip's directory says")
    name_length, extra_length = _LENGTHS.unpack_from(start, 26)
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    if file.read(name_length) != expected:
        raise CorruptFileError(f"{where}: {brief(info.orig_filename)} has another name where its bytes begin")
    file.read(extra_length)


def check_crc(found: int, info: zipfile.ZipInfo, where: str) -> None:
    """Compare the CRC of the bytes that were read with the one in the directory."""
    if found != info.CRC:
        raise CorruptFileError(
            f"{where}: {brief(info.orig_filename)} is damaged: its CRC-32 is {found:08x}, not {info.CRC:08x}"
        )
