"""What a file says about itself: one JSON document that knows its own checksum, and the arrays that it describes."""

import json
import math
import platform
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from .._version import __version__
from .stores import targets as opening
from .stores.atomic import CorruptFileError
from .stores.checksums import crc32
from .stores.npz import MANIFEST

FORMAT, VERSION = "adamw_numba", 1
_LONGEST = 1 << 28  # bytes
_REALS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in ("bool", *_INTEGERS, *_REALS)}
_FIELDS = {
    "class": str,
    "config": dict,
    "variables": list,
    "added": list,
    "step": int,
    "skipped_steps": int,
    "arrays": dict,
    "versions": dict,
}
_VARIABLE = {"name": str, "dtype": str, "shape": list, "excluded": bool}

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Saved(NamedTuple):
    """What was read: the document, and the arrays by name; bfloat16 as its bits in uint16."""

    document: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    where: str


def encoded(name: str) -> str:
    """A name as one step of a path, for every store: percent-encoded, and never hidden or special.

    Raises
    ------
    ValueError
        If the name is no text, but holds half of a character.
    """
    if not name.isascii() and re.search("[\ud800-\udfff]", name):
        raise ValueError(f"the name {name!r} holds a lone surrogate; expected text, which has an encoding")
    text = quote(name, safe="")
    if text[:1] in ("_", ".") or text == "zarr.json":
        text = f"%{ord(text[0]):02X}{text[1:]}"
    return text


def write(target: Any, document: dict[str, Any], arrays: Arrays, dtypes: Mapping[str, str], durable: bool) -> None:
    """Put arrays and the document that describes them into a target: the document last.

    Parameters
    ----------
    target : path, URL, mapping, or group of h5py or zarr
    document : dict
    arrays : dict
        NumPy arrays by name.
    dtypes : dict
        Their names for the document, ``bfloat16`` among them.
    durable : bool
    """
    entries: dict[str, dict[str, Any]] = {}
    with opening.writing(target, durable) as store:
        for key, given in arrays.items():
            array = given.astype(given.dtype.newbyteorder("="), copy=False)
            put = getattr(store, "set_bfloat16", None) if dtypes[key] == "bfloat16" else None
            # A mapping of the user's may keep what it is given, and ours goes on changing.
            (put or store.__setitem__)(key, np.array(array, order="C") if opening.is_mapping(target) else array)
            checksum = store.crc32(key) if hasattr(store, "crc32") else crc32(array)
            entries[key] = {"dtype": dtypes[key], "shape": list(array.shape), "crc32": checksum}
        store[MANIFEST] = np.frombuffer(_encode(document | {"arrays": entries}), np.uint8).copy()


def read(target: Any) -> Saved:
    """Everything that a target holds, verified.

    Raises
    ------
    CorruptFileError
        If it is not what was saved; the message names the file and what is wrong.
    ValueError
        If it was written by a newer version.
    """
    with opening.reading(target) as store:
        where = where_is(target)
        document = _document(store, where)
        found = _arrays(store, document, where)
        # A mapping of the user's gives what it keeps, and ours goes on changing.
        copied = opening.is_mapping(target)
        return Saved(document, {key: array.copy() if copied else array for key, array in found}, where)


def describe(target: Any) -> dict[str, Any]:
    """The document of a target alone."""
    with opening.reading(target) as store:
        return _document(store, where_is(target))


def verify(target: Any) -> int:
    """Read everything once, keeping one array at a time; the number of bytes of the arrays.

    Raises
    ------
    CorruptFileError
        If it is not what was saved.
    """
    with opening.reading(target) as store:
        where = where_is(target)
        return sum(array.nbytes for _, array in _arrays(store, _document(store, where), where))


def where_is(target: Any) -> str:
    """A target's name, for messages."""
    return f"the {type(target).__name__}" if opening.is_mapping(target) else str(target)


def _document(store: Any, where: str) -> dict[str, Any]:
    try:
        data = store[MANIFEST]
    except KeyError:
        raise CorruptFileError(f"{where} lacks {MANIFEST!r}; expected what AdamW has saved") from None
    array = np.asarray(data)
    if array.dtype != np.uint8 or array.ndim != 1 or array.size > _LONGEST:
        raise CorruptFileError(f"{where}: {MANIFEST!r} is {array.dtype} of shape {array.shape}; expected bytes")
    return _decode(array.tobytes(), where)


def _arrays(store: Any, document: dict[str, Any], where: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for key, entry in document["arrays"].items():
        try:
            given = store[key]
        except KeyError:
            raise CorruptFileError(f"{where} lacks {key!r}, which its {MANIFEST} names") from None
        given = np.asarray(given)
        array = _as_declared(given, entry, f"{where}: {key!r}")
        # What a store has compared with the bytes that it gave us need not be summed up again.
        known = store.crc32(key) if hasattr(store, "crc32") else crc32(array)
        if known != entry["crc32"]:
            raise CorruptFileError(f"{where}: {key!r} is damaged: its CRC-32 is {known:08x}, not {entry['crc32']:08x}")
        yield key, array


def _as_declared(array: np.ndarray[Any, Any], entry: dict[str, Any], what: str) -> np.ndarray[Any, Any]:
    """The dtype and shape of the document; stores know bfloat16 and complex numbers by other names."""
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if array.dtype == dtype and array.shape == shape:
        return array
    if array.dtype.hasobject or array.nbytes != math.prod(shape) * dtype.itemsize:
        raise CorruptFileError(
            f"{what} is {array.dtype} of shape {array.shape}; its {MANIFEST} says {entry['dtype']} of shape {shape}"
        )
    native = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    return native.reshape(-1).view(dtype).reshape(shape)


def _encode(document: dict[str, Any]) -> bytes:
    versions = {"adamw_numba": __version__, "numpy": np.__version__, "python": platform.python_version()}
    whole = {"format": FORMAT, "version": VERSION, **document, "versions": versions}
    text = json.dumps(whole, default=plain, separators=(",", ":")).encode()
    sealed = b'{"crc32":"%08x",' % zlib.crc32(text) + text[1:]
    if len(sealed) > _LONGEST:
        raise ValueError(
            f"the document about the state has {len(sealed)} bytes; expected at most {_LONGEST}: see `extra`"
        )
    return sealed


def plain(value: Any) -> Any:
    """NumPy's scalars as Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"the config holds {value!r} of type {type(value).__name__}; expected what JSON can hold")


def _decode(data: bytes, where: str) -> dict[str, Any]:
    found = re.match(rb'\{"crc32":"([0-9a-f]{8})",', data)
    if not found or zlib.crc32(b"{" + data[found.end() :]) != int(found[1], 16):
        raise CorruptFileError(f"{where}: {MANIFEST} is damaged: it does not have the checksum that it states")
    try:
        document = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: {MANIFEST} is no valid JSON: {error}") from error
    if document.get("format") != FORMAT or type(document.get("version")) is not int:
        raise CorruptFileError(f"{where} has the format {document.get('format')!r}; expected {FORMAT!r}")
    if document["version"] > VERSION:
        raise ValueError(
            f"{where} has schema version {document['version']}; this adamw_numba knows versions up to {VERSION}: "
            "expected an older file, or a newer adamw_numba"
        )
    _check(document, where)
    return document  # type: ignore[no-any-return]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object holds a key more than once")
    return result


def _check(document: dict[str, Any], where: str) -> None:
    for field, kind in _FIELDS.items():
        if type(document.get(field)) is not kind:
            raise CorruptFileError(f"{where}: {field!r} is {document.get(field)!r:.80}; expected a {kind.__name__}")
    if document["class"] not in ("AdamW", "LossScaleOptimizer"):
        raise CorruptFileError(f"{where} holds a {document['class']!r:.80}; expected 'AdamW' or 'LossScaleOptimizer'")
    if document["version"] < 1 or not all(0 <= document[count] < 2**62 for count in ("step", "skipped_steps")):
        raise CorruptFileError(f"{where} has a negative or huge version, step or count of skipped steps; expected none")
    if "extra" not in document:
        raise CorruptFileError(f"{where} lacks 'extra'; expected it, null where there is none")
    for variable in document["variables"]:
        if type(variable) is not dict or any(type(variable.get(f)) is not kind for f, kind in _VARIABLE.items()):
            raise CorruptFileError(f"{where} describes the variable {variable!r:.80}; expected {list(_VARIABLE)}")
        _check_entry(variable, f"{where}: variable {variable['name']!r:.80}")
    names = [variable["name"] for variable in document["variables"]]
    if len(set(names)) < len(names):
        raise CorruptFileError(f"{where} describes a variable more than once; expected every name once")
    for pair in document["added"]:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not bool:
            raise CorruptFileError(f"{where} describes the added variable {pair!r:.80}; expected a name and a boolean")
    for key, entry in document["arrays"].items():
        if type(entry) is not dict or type(entry.get("crc32")) is not int or not 0 <= entry["crc32"] < 2**32:
            raise CorruptFileError(f"{where} describes the array {key!r:.80} by {entry!r:.80}; expected a CRC-32")
        _check_entry(entry, f"{where}: {key!r:.80}")


def _check_entry(entry: dict[str, Any], what: str) -> None:
    if type(entry.get("dtype")) is not str or entry["dtype"] not in DTYPES:
        raise CorruptFileError(f"{what} has the dtype {entry.get('dtype')!r:.80}; expected one of {', '.join(DTYPES)}")
    shape = entry.get("shape")
    if type(shape) is not list or len(shape) > 64 or any(type(s) is not int or not 0 <= s < 2**63 for s in shape):
        raise CorruptFileError(f"{what} has the shape {shape!r:.80}; expected a list of sizes")
    if math.prod(shape) * DTYPES[entry["dtype"]].itemsize >= 2**63:
        raise CorruptFileError(f"{what} declares the shape {shape!r:.80}, more bytes than can be counted")
