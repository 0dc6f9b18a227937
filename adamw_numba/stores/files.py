"""Files that are replaced whole: the new one is complete and on disk before it takes the old one's name."""

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path


class CorruptFileError(ValueError):
    """A file does not hold what was saved: it is damaged, cut short, hostile, or of another kind."""


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder, renamed over `path` when the block ends well, removed when it does not."""
    _remove_abandoned(path)
    temporary = _temporary(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync(path.parent)


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
    """Wait until all that lies in a folder is on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever a reader stumbles over becomes an error that names the file; what the system says passes as it is."""
    try:
        yield
    except (CorruptFileError, ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptFileError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


def _flush(descriptor: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, AttributeError, OSError):  # only macOS has it, and there not on every file system
        os.fsync(descriptor)


def _temporary(path: Path) -> Path:
    stem, dot, suffix = path.name.partition(".")
    return path.with_name(f".{stem}.{_here()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp{dot}{suffix}")


def _here() -> str:
    return socket.gethostname().replace(".", "-")


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of the same name whose process is gone."""
    if os.name == "nt":
        return
    stem, dot, suffix = path.name.partition(".")
    start, end = f".{stem}.{_here()}.", f".tmp{dot}{suffix}"
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            number = name.removeprefix(start).partition(".")[0]
            if name.startswith(start) and name.endswith(end) and number.isdigit() and not _lives(int(number)):
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
    """Remove a file, or a folder with all that is in it; that it is gone already is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
