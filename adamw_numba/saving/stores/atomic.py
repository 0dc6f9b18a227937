"""Files that are replaced whole: the new one is complete and on disk before it takes the old one's name.

A temporary file, or a generation of a zarr folder, bears a mark: the host, the process and a random number of its
writer. A later save removes what bears the mark of a process that no longer lives, and nothing else: another process
may be writing beside it at the moment.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path


class CorruptFileError(ValueError):
    """A file does not hold what was saved: it is damaged, cut short, hostile, or of another kind."""


_UNDER_WAY: set[str] = set()  # the marks of what this process is writing at the moment, in all its threads


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder, renamed over `path` when the block ends well, removed when it does not.

    A symbolic link is followed, and the mode of an existing file kept.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder to save in does not exist", str(path.parent))
    _remove_abandoned(path)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    with under_way() as mark:
        temporary = _temporary(path, mark)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            os.close(os.open(temporary, flags, 0o666 if mode is None else mode | stat.S_IWUSR))
            yield temporary
            if mode is not None:
                os.chmod(temporary, mode)
            if durable:
                sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def under_way() -> Iterator[str]:
    """A mark for what is being written, by which others tell whether its writer still lives."""
    mark = f"{_here()}.{os.getpid()}.{uuid.uuid4().hex[:16]}"
    _UNDER_WAY.add(mark)
    try:
        yield mark
    finally:
        _UNDER_WAY.discard(mark)


def is_abandoned(mark: str) -> bool:
    """Whether the writer of what bears this mark is gone; that of another host counts as alive."""
    host, number, _ = mark.split(".")
    if os.name == "nt" or host != _here():
        return False
    return mark not in _UNDER_WAY if int(number) == os.getpid() else not _lives(int(number))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn whatever a reader raises into an error that names the file; errors of the system are raised as usual."""
    try:
        yield
    except (CorruptFileError, ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptFileError(f"{where} cannot be read: {type(error).__name__}: {error!s:.300}") from error


def _flush(descriptor: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, AttributeError, OSError):  # only macOS has it, and not on every file system
        os.fsync(descriptor)


def _temporary(path: Path, mark: str) -> Path:
    stem, dot, suffix = path.name.partition(".")
    return path.with_name(f".{stem}.{mark}.tmp{dot}{suffix}")


def _here() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "-"


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of the same name whose writer is gone."""
    stem, dot, suffix = map(re.escape, path.name.partition("."))
    ours = re.compile(rf"\.{stem}\.([^.]+\.\d+\.[0-9a-f]+)\.tmp{dot}{suffix}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            found = ours.fullmatch(name)
            if found and is_abandoned(found[1]):
                with contextlib.suppress(OSError):
                    os.unlink(path.with_name(name))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
