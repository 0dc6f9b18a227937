"""CRC-32 of arrays, in pieces."""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 1 << 20  # bytes; small enough to be in cache when it is written after its checksum was taken
_POLYNOMIAL = 0xEDB88320


def pieces(array: np.ndarray[Any, Any]) -> Iterator[Any]:
    """The bytes of an array in C order, piece by piece, without a copy of the whole."""
    if array.flags.c_contiguous:
        whole = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        yield from (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))
        return
    flags: Any = ["external_loop", "buffered", "zerosize_ok"]
    for piece in np.nditer(array, flags=flags, buffersize=PIECE // array.itemsize, order="C"):
        yield np.ascontiguousarray(piece).view(np.uint8)


def crc32(array: np.ndarray[Any, Any]) -> int:
    """The CRC-32 of an array's bytes in C order."""
    crc = 0
    for piece in pieces(array):
        crc = zlib.crc32(piece, crc)
    return crc


def joined(one: int, other: int, count: int) -> int:
    """The CRC-32 of bytes ``a + b`` from those of ``a`` and ``b``, where ``b`` has `count` bytes.

    The CRC is linear, so no byte has to be read again: this is what lets one pass over a large array serve both the
    array's own checksum and that of the file that holds it behind a header. It takes some 100 products in Python,
    which is more than summing up a small array twice.
    """
    return shifted(one, count) ^ other


def shifted(crc: int, count: int) -> int:
    """A CRC-32 moved ahead of `count` bytes: multiplied by ``x**(8 * count)``, by squaring."""
    power = 1 << 23  # x to the 8: one byte
    while count:
        if count & 1:
            crc = _product(power, crc)
        power = _product(power, power)
        count >>= 1
    return crc


def _product(one: int, other: int) -> int:
    """Polynomials over GF(2) multiplied, modulo that of CRC-32; the lowest power is the highest bit."""
    result = 0
    for bit in range(31, -1, -1):
        result ^= other * (one >> bit & 1)
        other = (other >> 1) ^ (_POLYNOMIAL * (other & 1))
    return result
