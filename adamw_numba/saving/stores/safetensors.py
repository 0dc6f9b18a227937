"""`.safetensors`: bfloat16 as such, complex128 as pairs, the JSON in the header's metadata."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays.brief import brief
from . import MANIFEST
from .atomic import CorruptFileError

_METADATA = "adamw_numba"


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
    specs = {
        key: package.TensorSpec(dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes)
        for key, (array, dtype) in writer.arrays.items()
    }
    try:
        package.serialize_file(specs, path, metadata={_METADATA: writer.manifest})
    except package.SafetensorError as error:
        if "header" not in str(error).lower():
            raise
        raise ValueError(
            f"names and `extra` take {len(writer.manifest)} bytes; expected what a .safetensors file holds ({error}), "
            "or another suffix"
        ) from error


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
    """Arrays in C order, held until all are written at once."""

    def __init__(self) -> None:
        self.arrays: dict[str, tuple[np.ndarray[Any, Any], str]] = {}
        self.manifest = ""

    def __setitem__(self, key: str, array: np.ndarray[Any, Any]) -> None:
        if key == MANIFEST:
            self.manifest = array.tobytes().decode()
            return
        # The library writes the memory that follows the first element, whatever the strides are.
        array = np.asarray(array, order="C")
        if array.dtype == np.complex128:
            array = array.reshape(*array.shape, 1).view(np.float64)
        self.arrays[key] = (array, array.dtype.name)

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self.arrays[key] = (np.asarray(bits, order="C"), "bfloat16")


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
