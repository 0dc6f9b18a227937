"""`.safetensors`: bfloat16 as such, complex128 as pairs, the JSON in the header's metadata.

The library reads. It does not write: it makes a temporary file of its own, which stays behind when the process is
killed; it gives the result to its owner alone, whatever the umask is; and it writes arrays that are not contiguous
wrongly. The format (https://huggingface.co/docs/safetensors) is the length of a JSON header in eight bytes, the header,
and the arrays.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays.brief import brief
from . import MANIFEST
from .atomic import CorruptFileError
from .checksums import pieces

_METADATA = "adamw_numba"
_LONGEST = 100_000_000  # bytes of a header that the library reads
_DTYPES = {"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"} | {
    f"{kind}{8 * size}": f"{letter}{8 * size}"
    for kind, letter, sizes in (("float", "F", (2, 4, 8)), ("int", "I", (1, 2, 4, 8)), ("uint", "U", (1, 2, 4, 8)))
    for size in sizes
}


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written when the block ends (mode ``"w"``), or read (``"r"``)."""
    package = library()
    if mode == "r":
        with open(path, "rb") as raw, package.safe_open(path, framework="numpy") as file:
            yield Reader(file, path, raw)
        return
    writer = Writer()
    yield writer
    with open(path, "wb") as file:
        writer.write(file)


def library() -> Any:
    """The package safetensors."""
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "a .safetensors file needs the package safetensors: pip install adamw_numba[safetensors]"
        ) from None
    return safetensors


class Writer:
    """Arrays held until all are written at once, behind a header that needs to know all of them."""

    def __init__(self) -> None:
        self.arrays: dict[str, tuple[np.ndarray[Any, Any], str]] = {}
        self.manifest = ""

    def __setitem__(self, key: str, array: np.ndarray[Any, Any]) -> None:
        if key == MANIFEST:
            self.manifest = array.tobytes().decode()
            return
        if array.dtype == np.complex128:
            array = np.asarray(array, order="C").reshape(*array.shape, 1).view(np.float64)
        self.arrays[key] = (array, _DTYPES[array.dtype.name])

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self.arrays[key] = (bits, _DTYPES["bfloat16"])

    def write(self, file: Any) -> None:
        """Write the header and all arrays, the widest numbers first: so each lies aligned."""
        order = sorted(self.arrays, key=lambda key: (-self.arrays[key][0].itemsize, key))
        file.write(self._header(order))
        for key in order:
            for piece in pieces(self.arrays[key][0]):
                file.write(piece)

    def _header(self, order: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {_METADATA: self.manifest}}
        end = 0
        for key in order:
            array, dtype = self.arrays[key]
            start, end = end, end + array.nbytes
            header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _LONGEST:
            raise ValueError(
                f"names and `extra` take {len(text)} bytes; expected at most {_LONGEST}, which is what a .safetensors "
                "file holds, or another suffix"
            )
        return len(text).to_bytes(8, "little") + text


class Reader:
    """The library checks names, offsets and sizes when the file is opened."""

    def __init__(self, file: Any, path: Path, raw: Any) -> None:
        self.file, self.path, self.raw = file, path, raw
        length = int.from_bytes(raw.read(8), "little")
        self.header: dict[str, Any] = json.loads(raw.read(length))
        self.start = 8 + length

    def keys(self) -> list[str]:
        """The names of the arrays."""
        return [key for key in self.header if key != "__metadata__"]

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        if key == MANIFEST:
            text = (self.file.metadata() or {}).get(_METADATA)
            if text is None:
                raise CorruptFileError(f"{self.path} lacks the metadata {_METADATA!r}; expected a file saved by AdamW")
            return np.frombuffer(text.encode(), np.uint8)
        if key not in self.header or key == "__metadata__":
            raise CorruptFileError(f"{self.path} lacks {brief(key)}; expected it among its tensors")
        entry = self.header[key]
        if 0 in entry["shape"] and max(entry["shape"]) > 2**32:
            raise CorruptFileError(f"{self.path}: {brief(key)} declares the shape {entry['shape']} for no bytes")
        return self._bits(entry) if entry["dtype"] == "BF16" else np.asarray(self.file.get_tensor(key))

    def _bits(self, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Numbers that NumPy has no dtype for, from where the header says that they are."""
        first, last = entry["data_offsets"]
        self.raw.seek(self.start + first)
        return np.fromfile(self.raw, np.uint16, (last - first) // 2).reshape(entry["shape"])
