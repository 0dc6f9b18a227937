"""What several processes have saved together: a folder with a file of each, and an index that is written last.

It is read by any number of processes, each its own pieces, and so is every other target.
"""

import contextlib
import errno
import json
import math
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.brief import brief, brief_names
from ..arrays.moments import BLOCK, SCALES
from ..arrays.pieces import Piece, copy_common, make_whole, whole
from ..ranks.meeting import checksums
from ..ranks.settings import different_settings, settings_of
from ..update import SLOTS
from . import archive, manifest, snapshot
from .archive import Saved
from .manifest import encoded
from .stores.atomic import CorruptFileError, naming, remove, replacing

INDEX = "index.json"
OF_A_VARIABLE = ("variables", *SLOTS)
_OURS = re.compile(r"rank-\d+-of-\d+\.[0-9a-f]{16}\.npz|index\.json|\..*\.tmp\..*")
Pieces = Mapping[str, Piece]


def is_of_a_variable(key: str) -> bool:
    """Whether the array of that key is cut like a variable."""
    return key.partition("/")[0] in OF_A_VARIABLE


def _of_slot(key: str, piece: Piece, dtype: str) -> Piece:
    """The piece that an array of the state is, of a piece of a variable: scales are one for each block."""
    if key.partition("/")[0] not in SCALES:
        return piece
    run, width = piece.as_run(), 1 + dtype.startswith("complex")
    if run is None:
        return Piece((0,), (0,), (0,))  # nothing has blocks that are cut so
    sizes = [-(-elements * width // BLOCK) for elements in (math.prod(piece.shape), run.own[0])]
    return Piece((sizes[0],), (run.start[0] * width // BLOCK,), (sizes[1],))


def is_folder(target: Any) -> bool:
    """Whether a target is a folder in which several processes have saved."""
    return _names_folder(target) and os.path.isdir(target)


def _names_folder(target: Any) -> bool:
    """Whether a target is the name of a folder: a path without suffix."""
    return isinstance(target, (str, os.PathLike)) and "." not in Path(target).name and "://" not in os.fspath(target)


@contextlib.contextmanager
def agreeing(together: Any, call: str) -> Iterator[Callable[..., Any]]:
    """Around checks that all ranks have to pass, where there are several: the block calls what it is given at its end.

    Whatever is raised before is told to all ranks, and none goes on.
    """
    if together is None:
        yield bool
    else:
        with together.deciding(call):
            yield together.agree


# Saving


def save(optimizer: Any, target: Any, extra: Any, variables: bool, durable: bool) -> None:
    """Write the state of all ranks, or on an error of any of them nothing that counts."""
    engine = snapshot.engine_of(optimizer)
    together = engine.together
    with engine.lock:
        with agreeing(together, "save") as agreed:
            if not _names_folder(target):
                raise ValueError(
                    f"`target` is {brief(target)}, and the optimizer is connected with those of other processes; "
                    "expected a path without suffix, the folder for the files of all of them"
                )
            path = Path(target)
            taken = snapshot.take(optimizer, extra, variables)
            mine = _told(taken, together)
            mine |= {"path": str(path.absolute()), "variables=": variables, "mark": uuid.uuid4().hex[:16]}
            mine["settings"] = settings_of(engine) | {
                key: engine.state.scalars[key].item()
                for key in ("iteration", "learning_rate")
                if key in engine.state.scalars
            }
            mine["extra"] = zlib.crc32(json.dumps(extra, sort_keys=True).encode())
            mine["replicated"] = _of_replicated(taken, engine, together)
            path.mkdir(exist_ok=True)
            before = _check_ours(path)
            agreed()
        told = together.tell(mine)
        size, mark = len(told), told[0]["mark"]
        files = [f"rank-{rank:05d}-of-{size:05d}.{mark}.npz" for rank in range(size)]
        with agreeing(together, "save") as agreed:
            if any(each["extra"] != told[0]["extra"] for each in told):
                raise ValueError(
                    "`extra` is not the same on all ranks; expected one payload: gather what each rank has of its own"
                )
            if any(each["settings"] != told[0]["settings"] for each in told):
                differ = different_settings([each["settings"] for each in told])
                raise ValueError(f"the hyperparameters differ: {differ}; expected the same on all ranks")
            for rank, each in enumerate(told):
                odd = [key for key, crc in each["replicated"] if [key, crc] not in told[0]["replicated"]]
                if odd:
                    raise ValueError(
                        f"the arrays of replicated variables differ: {brief_names(odd)} are others on rank {rank} "
                        "than on rank 0; expected the same on all ranks"
                    )
            for key in ("path", "variables=", "keys"):
                if any(each[key] != told[0][key] for each in told):
                    raise ValueError(
                        f"the ranks save different things: {key} is {brief([each[key] for each in told])} on them, in "
                        "order; expected the same on all"
                    )
            owned = _owned(told, together.ranks.rank)
            kept = {key: array for key, array in taken.arrays.items() if key in owned or not is_of_a_variable(key)}
            archive.write(path / files[together.ranks.rank], taken.document, kept, taken.dtypes, durable)
            agreed()
        # From here on no file may be removed: the index may name it.
        with agreeing(together, "save") as agreed:
            if together.ranks.rank == 0:
                missing = [file for file in files if not (path / file).exists()]
                if missing:
                    what = f"{brief_names(missing)} of this save are gone: another program saves in the folder"
                    raise FileNotFoundError(errno.ENOENT, what, str(path))
                document = _index(taken, told, files)
                with replacing(path / INDEX, durable) as temporary:
                    temporary.write_bytes(manifest.encode(document))
            agreed()
        if together.ranks.rank == 0:
            for found in before:  # not what another program is saving meanwhile
                if found != INDEX:
                    with contextlib.suppress(OSError):
                        remove(path / found)


def _told(taken: snapshot.Snapshot, together: Any) -> dict[str, Any]:
    """What the others have to know of this rank's arrays."""
    variables = []
    for entry in taken.document["variables"]:
        piece = together.pieces[entry["name"]]
        if piece is None:
            raise ValueError(
                f"the parts of {brief(entry['name'])} on several ranks make no whole variable (this one has shape "
                f"{tuple(entry['shape'])}); expected `build(..., pieces=...)`, which says where they are"
            )
        code = encoded(entry["name"])
        slots = {slot: taken.dtypes[f"{slot}/{code}"] for slot in OF_A_VARIABLE if f"{slot}/{code}" in taken.dtypes}
        variables.append([entry | {"shape": list(piece.shape)}, list(piece.start), list(piece.own), slots])
    keys = [key for key in taken.arrays if not is_of_a_variable(key)]
    return {"variables": variables, "groups": taken.document.get("groups", []), "keys": keys}


def _owned(told: list[dict[str, Any]], rank: int) -> set[str]:
    """The keys of the arrays that a rank writes: of a piece that several have, the first does."""
    seen: set[Any] = set()
    owned: set[str] = set()
    for k, each in enumerate(told):
        for entry, start, own, slots in each["variables"]:
            piece = entry["name"], tuple(start), tuple(own)
            if piece not in seen and k == rank:
                owned.update(f"{slot}/{encoded(entry['name'])}" for slot in slots)
            seen.add(piece)
    return owned


def _index(taken: snapshot.Snapshot, told: list[dict[str, Any]], files: list[str]) -> dict[str, Any]:
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
                shape = list(_of_slot(key, whole(entry["shape"]), entry["dtype"]).shape)
                arrays[key] = {"dtype": dtype, "shape": shape, "crc32": 0}
        for group in each["groups"]:
            own = json.dumps({key: value for key, value in group.items() if key != "names"}, sort_keys=True)
            groups.setdefault(own, group | {"names": []})["names"] += group["names"]
    for group in groups.values():
        group["names"] = list(dict.fromkeys(group["names"]))
    merged = {"groups": list(groups.values())} if groups else {}
    whole_ones = {"variables": list(variables.values()), "arrays": arrays, "files": files, "parts": parts}
    return {**taken.document, **merged, **whole_ones}


def _of_replicated(taken: snapshot.Snapshot, engine: Any, together: Any) -> list[list[Any]]:
    """The checksums of what has to be the same on all ranks."""
    workspace = engine.workspace
    found = checksums(workspace.names, workspace.variables, together.is_shared)
    codes = {encoded(name) for name, _ in found}
    keys = [key for key in taken.arrays if is_of_a_variable(key) and key.partition("/")[2] in codes]
    state = checksums(keys, [taken.arrays[key] for key in keys], [True] * len(keys))
    return [[f"variables/{name}", crc] for name, crc in found] + state


def _check_ours(path: Path) -> list[str]:
    """What is in a folder, all of which has been saved in it."""
    held = os.listdir(path)
    others = sorted(found for found in held if not _OURS.fullmatch(found))
    if others:
        raise ValueError(f"the folder {path} holds {brief_names(others)}; expected a new folder, or one saved in")
    return held


# Reading


def read(target: Any, together: Any = None, names: Iterable[str] | None = None) -> Saved:
    """Everything that a target holds; with `together`, the pieces that this rank has of it.

    Raises
    ------
    CorruptFileError
        If it is not what was saved.
    ValueError
        If a variable is not one of any rank's, or has another shape.
    """
    if _names_folder(target) and len(Path(target).name) < 256 and not os.path.lexists(target):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder, and a file has a suffix", str(target))
    if is_folder(target):
        return read_folder(Path(target), together, names)
    saved = archive.read(target)
    if together is None and names is None:
        return saved
    return cut(saved, together, names)


def read_folder(
    path: Path, together: Any = None, names: Iterable[str] | None = None, crc32: str | None = None
) -> Saved:
    """The same of a folder; with the checksum of an index, of that one alone.

    With `names` empty, what belongs to no variable, and the document of the whole.

    Raises
    ------
    CorruptFileError, ValueError
        As `read`; also if the folder has another index.
    """
    document = _read_index(path)
    if crc32 not in (None, document["crc32"]):
        raise ValueError(
            f"{path} holds another save than when the optimizer was loaded from it; expected the same: load it again"
        )
    wanted, pieces = _wanted(document, together, names, str(path)), _of_files(document)
    needed = [k for k, held in enumerate(pieces) if k == 0 or not wanted.keys().isdisjoint(held)]
    _check_sizes(path, document, pieces, needed)
    sources = ((_file(path, document, k), pieces[k]) for k in needed)
    return _assembled(document, sources, wanted, str(path))


def cut(saved: Saved, together: Any, names: Iterable[str] | None = None) -> Saved:
    """The pieces that a rank has of what was read as a whole."""
    wanted = _wanted(saved.document, together, names, saved.where)
    pieces = {entry["name"]: whole(entry["shape"]) for entry in saved.document["variables"]}
    return _assembled(saved.document, [(saved, pieces)], wanted, saved.where)


def describe(target: Any) -> dict[str, Any]:
    """The document of a target alone; of a folder its index."""
    return _read_index(Path(target)) if is_folder(target) else archive.describe(target)


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).exists():
        raise CorruptFileError(f"{path} lacks {INDEX}, which is written last; expected a folder that was saved")
    with naming(str(path)):
        data = (path / INDEX).read_bytes()
    document = manifest.decode(data, str(path))
    with naming(str(path)):
        _check_index(document, str(path))
    return document


def verify(target: Any, part: int = 0, parts: int = 1) -> int:
    """Read everything once, or of a folder some of the files; the number of bytes of the arrays.

    Raises
    ------
    CorruptFileError
        If it is not what was saved.
    """
    if not is_folder(target):
        return archive.verify(target)
    path, count = Path(target), 0
    document = _read_index(path)
    pieces, dtypes = _of_files(document), _dtypes(document)
    for number in range(part, len(pieces), parts):
        saved = _file(path, document, number)
        by_code = {encoded(name): (piece, dtypes[name]) for name, piece in pieces[number].items()}
        for key in filter(is_of_a_variable, saved.arrays):
            piece = by_code.get(key.partition("/")[2])
            if piece is None or saved.arrays[key].shape != _of_slot(key, *piece).own:
                raise CorruptFileError(f"{saved.where}: {brief(key)} is not as {INDEX} of {path} says")
        count += sum(array.nbytes for array in saved.arrays.values())
    return count


def _check_index(document: dict[str, Any], where: str) -> None:
    files, parts = document.get("files"), document.get("parts")
    names = [entry["name"] for entry in document["variables"]]
    if (
        type(files) is not list
        or not files
        or not all(type(file) is str and _OURS.fullmatch(file) and file.endswith(".npz") for file in files)
        or type(parts) is not dict
        or set(parts) != set(names)
    ):
        raise CorruptFileError(f"{where}: {INDEX} names the files {brief(files)}; expected a file of each rank")
    shapes = {encoded(entry["name"]): entry["shape"] for entry in document["variables"]}
    for key, entry in document["arrays"].items():
        if not is_of_a_variable(key) or shapes.get(key.partition("/")[2]) != entry["shape"]:
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


def _wanted(document: dict[str, Any], together: Any, names: Any, where: str) -> dict[str, Piece]:
    """The pieces to be read, of variables that are known to some rank."""
    entries = {entry["name"]: entry for entry in document["variables"]}
    if together is None:
        chosen = entries if names is None else names
        return {name: whole(entries[name]["shape"]) for name in chosen}
    unknown = [name for name in entries if name not in together.known]
    if unknown:
        raise ValueError(f"{where} holds {brief_names(unknown)}, which are not among the variables of any rank")
    wanted = {}
    for name, piece in together.pieces.items():
        if name not in entries:
            continue  # which the restore has an error for
        if piece is None:
            raise ValueError(
                f"where the parts of {brief(name)} on several ranks lie in the whole variable is not known; expected "
                "`build(..., pieces=...)`"
            )
        if piece.shape != tuple(entries[name]["shape"]):
            raise ValueError(
                f"{where} does not fit the variables: {brief(name)} was of shape {tuple(entries[name]['shape'])}, "
                f"and is of shape {piece.shape} on all ranks together; expected the same: see `replicated`, `pieces`"
            )
        wanted[name] = piece
    return wanted


def _dtypes(document: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["dtype"] for entry in document["variables"]}


def _of_files(document: dict[str, Any]) -> list[dict[str, Piece]]:
    """The pieces that each file of a folder has."""
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in document["variables"]}
    found: list[dict[str, Piece]] = [{} for _ in document["files"]]
    for name, parts in document["parts"].items():
        for number, start, own in parts:
            found[number][name] = Piece(shapes[name], tuple(start), tuple(own))
    return found


def _check_sizes(path: Path, document: dict[str, Any], pieces: Sequence[Pieces], needed: Iterable[int]) -> None:
    """Refuse files shorter than their arrays, none of which is compressed: before memory is taken for these."""
    widths = dict.fromkeys((encoded(name) for name in document["parts"]), 0)  # bytes of all that an element has
    for key, entry in document["arrays"].items():
        widths[key.partition("/")[2]] += manifest.DTYPES[entry["dtype"]].itemsize
    for number in needed:
        expected = sum(math.prod(piece.own) * widths[encoded(name)] for name, piece in pieces[number].items())
        file = document["files"][number]
        try:
            size = (path / file).stat().st_size
        except FileNotFoundError:
            raise _lacks(path, file) from None
        if size < expected:
            raise CorruptFileError(
                f"{path / file} has {size} bytes; expected at least {expected}, of arrays that {INDEX} says it holds"
            )


def _file(path: Path, document: dict[str, Any], number: int) -> Saved:
    try:
        saved = archive.read(path / document["files"][number])
    except FileNotFoundError:
        raise _lacks(path, document["files"][number]) from None
    if saved.document["step"] != document["step"]:
        raise CorruptFileError(
            f"{saved.where} is of step {saved.document['step']}, and its {INDEX} of {document['step']}"
        )
    return saved


def _lacks(path: Path, file: str) -> CorruptFileError:
    return CorruptFileError(f"{path} lacks {file}, which its {INDEX} names")


def _assembled(document: dict[str, Any], sources: Iterable[tuple[Saved, Pieces]], wanted: Pieces, where: str) -> Saved:
    """What was read as if it had been saved in the pieces that are wanted."""
    declared: dict[str, Any] = {}
    found: dict[str, np.ndarray[Any, Any]] = {}
    copied: dict[str, int] = {}
    by_code, dtypes = {encoded(name): name for name in wanted}, _dtypes(document)
    for key, entry in document["arrays"].items():
        name = by_code.get(key.partition("/")[2])
        if is_of_a_variable(key) and name is not None:
            own = _of_slot(key, wanted[name], dtypes[name]).own
            found[key], copied[key] = np.empty(own, manifest.DTYPES[entry["dtype"]]), 0
            declared[key] = entry | {"shape": list(own)}
    for number, (saved, pieces) in enumerate(sources):
        for key, array in saved.arrays.items():
            if not is_of_a_variable(key):
                if number == 0:
                    found[key], declared[key] = array, saved.document["arrays"][key]
            elif key in copied:
                name = by_code[key.partition("/")[2]]
                there = None if name not in pieces else _of_slot(key, pieces[name], dtypes[name])
                if there is None or array.shape != there.own or array.dtype != found[key].dtype:
                    raise CorruptFileError(f"{saved.where}: {brief(key)} is not as {INDEX} of {where} says")
                copied[key] += copy_common(array, there, found[key], _of_slot(key, wanted[name], dtypes[name]))
    short = [key for key, count in copied.items() if count != found[key].size]
    if short:
        raise CorruptFileError(f"{where} holds not all elements of {brief(short[0])}")
    variables = [
        entry | {"shape": list(wanted[entry["name"]].own)} for entry in document["variables"] if entry["name"] in wanted
    ]
    rest = {key: value for key, value in document.items() if key not in ("files", "parts")}
    return Saved({**rest, "variables": variables, "arrays": declared}, found, where)
