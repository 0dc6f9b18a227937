"""A document and the arrays that it describes, into a target and out of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arrays.brief import brief
from . import manifest
from .stores import MANIFEST, targets
from .stores.atomic import CorruptFileError
from .stores.checksums import crc32

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Saved(NamedTuple):
    """What was read: the document, and the arrays by name; bfloat16 as its bits in uint16."""

    document: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    where: str


def write(target: Any, document: dict[str, Any], arrays: Arrays, dtypes: Mapping[str, str], durable: bool) -> None:
    """Put arrays and the document that describes them into a target: the document last.

    Parameters
    ----------
    target : path, URL, mapping, or group of h5py or zarr
    document : dict
    arrays : dict
        NumPy arrays by name.
    dtypes : dict
        The names of their dtypes for the document, ``bfloat16`` among them.
    durable : bool
    """
    # A mapping of the user's may keep the very object that it is given, and ours changes with the next step.
    copies = targets.is_mapping(target)
    with targets.writing(target, durable) as store:
        entries = {
            key: _put(store, key, np.array(array, order="C") if copies else array, dtypes[key])
            for key, array in arrays.items()
        }
        store[MANIFEST] = np.frombuffer(manifest.encode(document | {"arrays": entries}), np.uint8).copy()


def _put(store: Any, key: str, array: np.ndarray[Any, Any], dtype: str) -> dict[str, Any]:
    """Put one array into a store; how the document describes it."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if dtype == "bfloat16" and hasattr(store, "set_bfloat16"):
        store.set_bfloat16(key, array)
    else:
        store[key] = array
    return {"dtype": dtype, "shape": list(array.shape), "crc32": _checksum(store, key, array)}


def _checksum(store: Any, key: str, array: np.ndarray[Any, Any]) -> int:
    """The CRC-32 of an array that a store was given or gave; some stores have taken it on the way."""
    return int(store.crc32(key)) if hasattr(store, "crc32") else crc32(array)


def read(target: Any) -> Saved:
    """Everything that a target holds, verified.

    Raises
    ------
    CorruptFileError
        If it is not what was saved; the message names the file and what is wrong.
    ValueError
        If it was written by a newer version.
    """
    # A mapping of the user's gives the very object that it keeps, and ours changes with the next step.
    copies = targets.is_mapping(target)
    with targets.reading(target) as store:
        where = where_is(target)
        document = _document(store, where)
        found = _arrays(store, document, where)
        return Saved(document, {key: array.copy() if copies else array for key, array in found}, where)


def describe(target: Any) -> dict[str, Any]:
    """The document of a target alone."""
    with targets.reading(target) as store:
        return _document(store, where_is(target))


def verify(target: Any) -> int:
    """Read everything once, keeping one array at a time; the number of bytes of the arrays.

    Raises
    ------
    CorruptFileError
        If it is not what was saved.
    """
    with targets.reading(target) as store:
        where = where_is(target)
        return sum(array.nbytes for _, array in _arrays(store, _document(store, where), where))


def where_is(target: Any) -> str:
    """A target's name, for messages."""
    return f"the {type(target).__name__}" if targets.is_mapping(target) else str(target)


def _document(store: Any, where: str) -> dict[str, Any]:
    try:
        data = store[MANIFEST]
    except KeyError:
        raise CorruptFileError(f"{where} lacks {MANIFEST!r}; expected what AdamW has saved") from None
    array = np.asarray(data)
    if array.dtype != np.uint8 or array.ndim != 1 or array.size > manifest.LONGEST:
        raise CorruptFileError(f"{where}: {MANIFEST!r} is {array.dtype} of shape {array.shape}; expected bytes")
    return manifest.decode(array.tobytes(), where)


def _arrays(store: Any, document: dict[str, Any], where: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for key, entry in document["arrays"].items():
        try:
            given = store[key]
        except KeyError:
            raise CorruptFileError(f"{where} lacks {brief(key)}, which its {MANIFEST} names") from None
        array = _as_declared(np.asarray(given), entry, where, key)
        found = _checksum(store, key, array)
        if found != entry["crc32"]:
            raise CorruptFileError(
                f"{where}: {brief(key)} is damaged: its CRC-32 is {found:08x}, not {entry['crc32']:08x}"
            )
        yield key, array


def _as_declared(array: np.ndarray[Any, Any], entry: dict[str, Any], where: str, key: str) -> np.ndarray[Any, Any]:
    """The dtype and shape of the document; stores know bfloat16 and complex numbers by other names."""
    dtype, shape = manifest.DTYPES[entry["dtype"]], tuple(entry["shape"])
    if array.dtype == dtype and array.shape == shape:
        return array
    if array.dtype.hasobject or array.nbytes != math.prod(shape) * dtype.itemsize:
        raise CorruptFileError(
            f"{where}: {brief(key)} is {array.dtype} of shape {array.shape}; its {MANIFEST} says {entry['dtype']} of "
            f"shape {shape}"
        )
    native = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    return native.reshape(-1).view(dtype).reshape(shape)
