"""`.safetensors`: bfloat16 as such, complex128 as pairs, the JSON in the header's metadata."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .files import CorruptFileError
from .npz import MANIFEST

_METADATA = "adamw_numba"


@contextmanager
def opened(path: Path, mode: str) -> Iterator[Any]:
    """A mapping over a file that is written when the block ends (mode ``"w"``), or read (``"r"``)."""
    library = _library()
    if mode == "r":
        with library.safe_open(path, framework="numpy") as file:
            yield Reader(file, path)
        return
    writer = Writer()
    yield writer
    specs = {
        key: library.TensorSpec(dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes)
        for key, (array, dtype) in writer.arrays.items()
    }
    library.serialize_file(specs, path, metadata={_METADATA: writer.manifest})


def _library() -> Any:
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
        # Others than these come out wrong: the library writes the memory that follows the first element.
        array = np.asarray(array, order="C")
        if array.dtype == np.complex128:
            array = array.reshape(*array.shape, 1).view(np.float64)
        self.arrays[key] = (array, array.dtype.name)

    def set_bfloat16(self, key: str, bits: np.ndarray[Any, Any]) -> None:
        """Put in bfloat16 numbers by their bits."""
        self.arrays[key] = (np.asarray(bits, order="C"), "bfloat16")


class Reader:
    """The library checks names, offsets and sizes when the file is opened."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path

    def keys(self) -> list[str]:
        """The names of the arrays."""
        return list(self.file.keys())

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        if key == MANIFEST:
            text = (self.file.metadata() or {}).get(_METADATA)
            if text is None:
                raise CorruptFileError(f"{self.path} lacks the metadata {_METADATA!r}; expected a file saved by AdamW")
            return np.frombuffer(text.encode(), np.uint8)
        if key not in self.keys():
            raise CorruptFileError(f"{self.path} lacks {key!r}; expected it among its tensors")
        view = self.file.get_slice(key)
        if 0 in view.get_shape() and max(view.get_shape()) > 2**32:
            raise CorruptFileError(f"{self.path}: {key!r} declares the shape {view.get_shape()} for no bytes")
        return self._bits(key) if view.get_dtype() == "BF16" else np.asarray(self.file.get_tensor(key))

    def _bits(self, key: str) -> np.ndarray[Any, Any]:
        """What NumPy has no dtype for, from where the header says."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[key]
        start, end = entry["data_offsets"]
        bits = np.fromfile(self.path, np.uint16, (end - start) // 2, offset=8 + length + start)
        return bits.reshape(entry["shape"])
