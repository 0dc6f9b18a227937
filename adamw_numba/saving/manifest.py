"""What a file says about itself: one JSON document that knows its own checksum; and how names are spelled in files."""

import json
import math
import platform
import re
import zlib
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from .._version import __version__
from ..arrays.brief import brief
from ..ranks.meeting import plain
from .overrides import is_description
from .stores import MANIFEST
from .stores.atomic import CorruptFileError

FORMAT = "adamw_numba"
VERSION, WITHOUT_GROUPS = 2, 1  # older versions read files of an optimizer that has no groups
LONGEST = 1 << 28  # bytes of a document
_REALS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in ("bool", *_INTEGERS, *_REALS)}
_ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}
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


def encoded(name: str) -> str:
    """A name as one step of a path, for every store: percent-encoded, and never hidden or special.

    Raises
    ------
    ValueError
        If the name is no text, but holds half of a character.
    """
    if not name.isascii() and re.search("[\ud800-\udfff]", name):
        raise ValueError(f"the name {brief(name)} holds a lone surrogate; expected text, which has an encoding")
    text = quote(name, safe="")
    if text[:1] in ("_", ".") or text == "zarr.json":
        text = f"%{ord(text[0]):02X}{text[1:]}"
    return text


def decoded(key: str) -> str:
    """The key of an array as people write it: ``momentum/dense%2Fkernel`` is ``momentum/dense/kernel``."""
    kind, slash, name = key.partition("/")
    return f"{kind}{slash}{unquote(name)}"


def encode(document: dict[str, Any]) -> bytes:
    """A document as JSON, with its own checksum in front, and the versions of what wrote it.

    Raises
    ------
    ValueError
        If it is longer than `decode` takes.
    """
    versions = {"adamw_numba": __version__, "numpy": np.__version__, "python": platform.python_version()}
    version = VERSION if document.get("groups") else WITHOUT_GROUPS
    whole = {"format": FORMAT, "version": version, **document, "versions": versions}
    text = json.dumps(whole, default=plain, separators=(",", ":")).encode()
    # The checksum is of the text without it, so it can stand inside what it protects.
    sealed = b'{"crc32":"%08x",' % zlib.crc32(text) + text[1:]
    if len(sealed) > LONGEST:
        raise ValueError(
            f"the document about the state has {len(sealed)} bytes; expected at most {LONGEST}: see `extra`"
        )
    return sealed


def decode(data: bytes, where: str) -> dict[str, Any]:
    """The document that `encode` has written, checked: whoever reads it on may trust its kinds and sizes.

    Raises
    ------
    CorruptFileError
        If it is not what was written.
    ValueError
        If a newer version has written it.
    """
    found = re.match(rb'\{"crc32":"([0-9a-f]{8})",', data)
    if not found or zlib.crc32(b"{" + data[found.end() :]) != int(found[1], 16):
        raise CorruptFileError(f"{where}: {MANIFEST} is damaged: it does not have the checksum that it states")
    try:
        document: dict[str, Any] = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: {MANIFEST} is no valid JSON: {error}") from error
    check(document, where)
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object holds a key more than once")
    return result


def check(document: dict[str, Any], where: str) -> None:
    """Refuse a document of another format or version, and one whose fields are not what they should be."""
    if document.get("format") != FORMAT or type(document.get("version")) is not int:
        raise CorruptFileError(f"{where} has the format {brief(document.get('format'))}; expected {FORMAT!r}")
    if document["version"] > VERSION:
        raise ValueError(
            f"{where} has schema version {brief(document['version'])}; this adamw_numba knows versions up to "
            f"{VERSION}: expected an older file, or a newer adamw_numba"
        )
    _check_fields(document, where)
    _check_variables(document["variables"], where)
    for pair in document["added"]:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not bool:
            raise CorruptFileError(f"{where} describes the added variable {brief(pair)}; expected a name and a boolean")
    groups = document.get("groups", [])
    if type(groups) is not list or not all(map(is_description, groups)):
        raise CorruptFileError(f"{where} describes its groups by {brief(groups)}; expected a list of them")
    for key, entry in document["arrays"].items():
        if type(entry) is not dict or type(entry.get("crc32")) is not int or not 0 <= entry["crc32"] < 2**32:
            raise CorruptFileError(f"{where} describes the array {brief(key)} by {brief(entry)}; expected a CRC-32")
        if fault := _fault(entry):
            raise CorruptFileError(f"{where}: {brief(key)} {fault}")


def _check_fields(document: dict[str, Any], where: str) -> None:
    for field, kind in _FIELDS.items():
        if type(document.get(field)) is not kind:
            raise CorruptFileError(f"{where}: {field!r} is {brief(document.get(field))}; expected a {kind.__name__}")
    if document["class"] not in ("AdamW", "LossScaleOptimizer"):
        raise CorruptFileError(f"{where} holds a {brief(document['class'])}; expected 'AdamW' or 'LossScaleOptimizer'")
    if document["version"] < 1 or not all(0 <= document[count] < 2**62 for count in ("step", "skipped_steps")):
        raise CorruptFileError(f"{where} has a negative or huge version, step or count of skipped steps; expected none")
    if "extra" not in document:
        raise CorruptFileError(f"{where} lacks 'extra'; expected it, null where there is none")


def _check_variables(variables: list[Any], where: str) -> None:
    names = set()
    for variable in variables:
        if type(variable) is not dict or any(type(variable.get(f)) is not kind for f, kind in _VARIABLE.items()):
            raise CorruptFileError(f"{where} describes the variable {brief(variable)}; expected {list(_VARIABLE)}")
        if fault := _fault(variable):
            raise CorruptFileError(f"{where}: variable {brief(variable['name'])} {fault}")
        names.add(variable["name"])
    if len(names) < len(variables):
        raise CorruptFileError(f"{where} describes a variable more than once; expected every name once")


def _fault(entry: dict[str, Any]) -> str | None:
    """What is wrong with a dtype and a shape: of text, so that nothing is put together for those that are right."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if type(dtype) is not str or dtype not in DTYPES:
        return f"has the dtype {brief(dtype)}; expected one of {', '.join(DTYPES)}"
    if type(shape) is not list or len(shape) > 64 or not all(type(s) is int and 0 <= s < 2**63 for s in shape):
        return f"has the shape {brief(shape)}; expected a list of sizes"
    if math.prod(shape) * _ITEMSIZE[dtype] >= 2**63:
        return f"declares the shape {brief(shape)}, more bytes than can be counted"
    return None
