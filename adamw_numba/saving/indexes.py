"""The index of a folder in which several processes have saved: which file has which pieces of which variables."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arrays.brief import brief
from ..arrays.moments import BLOCK, SCALES
from ..arrays.pieces import Piece, make_whole, whole
from ..update import SLOTS
from . import manifest
from .manifest import encoded
from .stores.atomic import CorruptFileError, naming

INDEX = "index.json"
OF_A_VARIABLE = ("variables", *SLOTS)
OURS = re.compile(r"rank-\d+-of-\d+\.[0-9a-f]{16}\.npz|index\.json|\..*\.tmp\..*")
Pieces = Mapping[str, Piece]


def is_of_a_variable(key: str) -> bool:
    """Whether the array of that key is cut like a variable."""
    return key.partition("/")[0] in OF_A_VARIABLE


def of_slot(key: str, piece: Piece, dtype: str) -> Piece:
    """The piece that an array of the state is, of a piece of a variable: scales are one for each block."""
    if key.partition("/")[0] not in SCALES:
        return piece
    run, width = piece.as_run(), 1 + dtype.startswith("complex")
    if run is None:
        return Piece((0,), (0,), (0,))  # nothing has blocks that are cut so
    sizes = [-(-elements * width // BLOCK) for elements in (math.prod(piece.shape), run.own[0])]
    return Piece((sizes[0],), (run.start[0] * width // BLOCK,), (sizes[1],))


def index_of(document: dict[str, Any], told: list[dict[str, Any]], files: list[str]) -> dict[str, Any]:
    """The document of a whole: rank 0's, with the variables and the groups of all."""
    variables: dict[str, Any] = {}
    parts: dict[str, list[Any]] = {}
    arrays: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for rank, each in enumerate(told):
        for entry, start, own, slots in each["variables"]:
            name = entry["name"]
            variables.setdefault(name, entry)
            where = parts.setdefault(name, [])
            if all([start, own] != known[1:] for known in where):
                where.append([rank, start, own])
            for slot, dtype in slots.items():
                key = f"{slot}/{encoded(name)}"
                shape = list(of_slot(key, whole(entry["shape"]), entry["dtype"]).shape)
                arrays[key] = {"dtype": dtype, "shape": shape, "crc32": 0}
        for group in each["groups"]:
            own = json.dumps({key: value for key, value in group.items() if key != "names"}, sort_keys=True)
            groups.setdefault(own, group | {"names": []})["names"] += group["names"]
    for group in groups.values():
        group["names"] = list(dict.fromkeys(group["names"]))
    merged = {"groups": list(groups.values())} if groups else {}
    whole_ones = {"variables": list(variables.values()), "arrays": arrays, "files": files, "parts": parts}
    return {**document, **merged, **whole_ones}


def read_index(path: Path) -> dict[str, Any]:
    """The index of a folder, checked."""
    if not (path / INDEX).exists():
        raise CorruptFileError(f"{path} lacks {INDEX}, which is written last; expected a folder that was saved")
    with naming(str(path)):
        data = (path / INDEX).read_bytes()
    document = manifest.decode(data, str(path))
    with naming(str(path)):
        _check(document, str(path))
    return document


def _check(document: dict[str, Any], where: str) -> None:
    files, parts = document.get("files"), document.get("parts")
    names = [entry["name"] for entry in document["variables"]]
    if (
        type(files) is not list
        or not files
        or not all(type(file) is str and OURS.fullmatch(file) and file.endswith(".npz") for file in files)
        or type(parts) is not dict
        or set(parts) != set(names)
    ):
        raise CorruptFileError(f"{where}: {INDEX} names the files {brief(files)}; expected a file of each rank")
    of = {encoded(entry["name"]): (whole(entry["shape"]), entry["dtype"]) for entry in document["variables"]}
    for key, entry in document["arrays"].items():
        variable = of.get(key.partition("/")[2]) if is_of_a_variable(key) else None
        if variable is None or list(of_slot(key, *variable).shape) != entry["shape"]:
            raise CorruptFileError(
                f"{where}: {INDEX} says that {brief(key)} has shape {brief(entry['shape'])}; expected arrays of the "
                f"variables, of their shapes: {', '.join(OF_A_VARIABLE)}"
            )
    for entry in document["variables"]:
        try:
            if any(type(k) is not int for file, start, own in parts[entry["name"]] for k in (file, *start, *own)):
                raise ValueError("a position is no integer")
            found = [Piece(tuple(entry["shape"]), tuple(start), tuple(own)) for _, start, own in parts[entry["name"]]]
            fits = all(part.fault() is None for part in found) and make_whole(found)
            held_by = {file for file, *_ in parts[entry["name"]]}  # each has one part at most
            fits = fits and held_by.issubset(range(len(files))) and len(held_by) == len(found)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise CorruptFileError(
                f"{where}: {INDEX} says that the parts of {brief(entry['name'])} are {brief(parts[entry['name']])}; "
                "expected parts that make a whole"
            )


def dtypes_of(document: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["dtype"] for entry in document["variables"]}


def of_files(document: dict[str, Any]) -> list[dict[str, Piece]]:
    """The pieces that each file of a folder has."""
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in document["variables"]}
    found: list[dict[str, Piece]] = [{} for _ in document["files"]]
    for name, parts in document["parts"].items():
        for number, start, own in parts:
            found[number][name] = Piece(shapes[name], tuple(start), tuple(own))
    return found


def check_sizes(path: Path, document: dict[str, Any], pieces: Sequence[Pieces], needed: Iterable[int]) -> None:
    """Refuse files shorter than their arrays, none of which is compressed: before memory is taken for these."""
    dtypes = dtypes_of(document)
    held: dict[str, list[tuple[str, int]]] = {}
    for key, entry in document["arrays"].items():
        held.setdefault(key.partition("/")[2], []).append((key, manifest.DTYPES[entry["dtype"]].itemsize))
    for number in needed:
        expected = sum(
            math.prod(of_slot(key, piece, dtypes[name]).own) * width
            for name, piece in pieces[number].items()
            for key, width in held.get(encoded(name), ())
        )
        file = document["files"][number]
        try:
            size = (path / file).stat().st_size
        except FileNotFoundError:
            raise lacks(path, file) from None
        if size < expected:
            raise CorruptFileError(
                f"{path / file} has {size} bytes; expected at least {expected}, of arrays that {INDEX} says it holds"
            )


def lacks(path: Path, file: str) -> CorruptFileError:
    """What to raise where a file is not there."""
    return CorruptFileError(f"{path} lacks {file}, which its {INDEX} names")
