"""What several processes have saved together: a folder with a file of each, and an index that is written last.

It is read by any number of processes, each its own pieces, and so is every other target.
"""

import contextlib
import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.brief import brief, brief_names
from ..arrays.pieces import Piece, copy_common, whole
from ..ranks.meeting import checksums
from ..ranks.settings import different_settings, settings_of
from . import archive, manifest, snapshot
from .archive import Saved
from .indexes import (
    INDEX,
    OF_A_VARIABLE,
    OURS,
    Pieces,
    check_sizes,
    dtypes_of,
    index_of,
    is_of_a_variable,
    lacks,
    of_files,
    of_slot,
    read_index,
)
from .manifest import encoded
from .stores.atomic import CorruptFileError, remove, replacing


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
                document = index_of(taken.document, told, files)
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
    others = sorted(found for found in held if not OURS.fullmatch(found))
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
    document = read_index(path)
    if crc32 not in (None, document["crc32"]):
        raise ValueError(
            f"{path} holds another save than when the optimizer was loaded from it; expected the same: load it again"
        )
    wanted, pieces = _wanted(document, together, names, str(path)), of_files(document)
    needed = [k for k, held in enumerate(pieces) if k == 0 or not wanted.keys().isdisjoint(held)]
    check_sizes(path, document, pieces, needed)
    sources = ((_file(path, document, k), pieces[k]) for k in needed)
    return _assembled(document, sources, wanted, str(path))


def cut(saved: Saved, together: Any, names: Iterable[str] | None = None) -> Saved:
    """The pieces that a rank has of what was read as a whole."""
    wanted = _wanted(saved.document, together, names, saved.where)
    pieces = {entry["name"]: whole(entry["shape"]) for entry in saved.document["variables"]}
    return _assembled(saved.document, [(saved, pieces)], wanted, saved.where)


def describe(target: Any) -> dict[str, Any]:
    """The document of a target alone; of a folder its index."""
    return read_index(Path(target)) if is_folder(target) else archive.describe(target)


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
    document = read_index(path)
    pieces, dtypes = of_files(document), dtypes_of(document)
    for number in range(part, len(pieces), parts):
        saved = _file(path, document, number)
        by_code = {encoded(name): (piece, dtypes[name]) for name, piece in pieces[number].items()}
        for key in filter(is_of_a_variable, saved.arrays):
            piece = by_code.get(key.partition("/")[2])
            if piece is None or saved.arrays[key].shape != of_slot(key, *piece).own:
                raise CorruptFileError(f"{saved.where}: {brief(key)} is not as {INDEX} of {path} says")
        count += sum(array.nbytes for array in saved.arrays.values())
    return count


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


def _file(path: Path, document: dict[str, Any], number: int) -> Saved:
    try:
        saved = archive.read(path / document["files"][number])
    except FileNotFoundError:
        raise lacks(path, document["files"][number]) from None
    if saved.document["step"] != document["step"]:
        raise CorruptFileError(
            f"{saved.where} is of step {saved.document['step']}, and its {INDEX} of {document['step']}"
        )
    return saved


def _assembled(document: dict[str, Any], sources: Iterable[tuple[Saved, Pieces]], wanted: Pieces, where: str) -> Saved:
    """What was read as if it had been saved in the pieces that are wanted."""
    declared: dict[str, Any] = {}
    found: dict[str, np.ndarray[Any, Any]] = {}
    copied: dict[str, int] = {}
    by_code, dtypes = {encoded(name): name for name in wanted}, dtypes_of(document)
    for key, entry in document["arrays"].items():
        name = by_code.get(key.partition("/")[2])
        if is_of_a_variable(key) and name is not None:
            own = of_slot(key, wanted[name], dtypes[name]).own
            found[key], copied[key] = np.empty(own, manifest.DTYPES[entry["dtype"]]), 0
            declared[key] = entry | {"shape": list(own)}
    for number, (saved, pieces) in enumerate(sources):
        for key, array in saved.arrays.items():
            if not is_of_a_variable(key):
                if number == 0:
                    found[key], declared[key] = array, saved.document["arrays"][key]
            elif key in copied:
                name = by_code[key.partition("/")[2]]
                there = None if name not in pieces else of_slot(key, pieces[name], dtypes[name])
                if there is None or array.shape != there.own or array.dtype != found[key].dtype:
                    raise CorruptFileError(f"{saved.where}: {brief(key)} is not as {INDEX} of {where} says")
                copied[key] += copy_common(array, there, found[key], of_slot(key, wanted[name], dtypes[name]))
    short = [key for key, count in copied.items() if count != found[key].size]
    if short:
        raise CorruptFileError(f"{where} holds not all elements of {brief(short[0])}")
    variables = [
        entry | {"shape": list(wanted[entry["name"]].own)} for entry in document["variables"] if entry["name"] in wanted
    ]
    rest = {key: value for key, value in document.items() if key not in ("files", "parts")}
    return Saved({**rest, "variables": variables, "arrays": declared}, found, where)
