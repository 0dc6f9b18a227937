"""Saves that are cut off: at every operation, by SIGKILL, by a full disk, and files that decay afterwards."""

import builtins
import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.numbered import FILES, found_in, optimizer_of, save

from adamw_numba import AdamW, CorruptFileError
from adamw_numba.saving import archive, manifest
from adamw_numba.saving.stores import atomic, checksums, npz, targets

TESTS = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, uses fork and resource limits")


class Recorder:
    """What a save does to the file system, operation by operation."""

    def __init__(self, monkeypatch, folder):
        self.operations, self.seen, self.folder = [], {}, folder
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "unlink", self.unlink)
        monkeypatch.setattr(npz, "open", self.open, raising=False)

    def open(self, path, mode):
        recorder, file = self, builtins.open(path, mode, buffering=0)
        if "w" in mode:
            write = file.write

            class Recorded:
                def __getattr__(self, name):
                    return getattr(file, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def write(self, data):
                    count = write(data)
                    recorder.note(path)
                    return count

            return Recorded()
        return file

    def note(self, path):
        """What a file holds now; in pieces, where a library has written it out of sight."""
        content = Path(path).read_bytes()
        if self.seen.get(str(path)) != content:
            old = self.seen.get(str(path), b"")
            for part in (3, 2, 1) if len(content) > len(old) + 2000 else (1,):
                self.operations.append(("write", str(path), content[: len(content) // part]))
            self.seen[str(path)] = content

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not os.path.isdir(path):
            self.note(path)
        self.operations.append(("sync", path))
        self.real["fsync"](descriptor)

    def replace(self, source, target, **options):
        self.note(source)
        self.operations.append(("rename", str(source), str(target)))
        self.real["replace"](source, target, **options)

    def unlink(self, path, **options):
        self.operations.append(("unlink", str(path)))
        self.real["unlink"](path, **options)


def after_a_crash(operations, target, old):
    """What the target may hold: names and contents each as they were last seen, or as they were last synced."""
    content, synced = {target: old}, {target: old}
    names, durable = {target: target}, {target: target}  # name -> the name that its content was written under
    for kind, path, *rest in operations:
        if kind == "write":
            content[path] = rest[0]
            names.setdefault(path, path)
        elif kind == "sync" and path == os.path.dirname(target):
            durable = dict(names)
        elif kind == "sync":
            synced[path] = content[path]
        elif kind == "rename":
            names[rest[0]] = names.pop(path)
        elif kind == "unlink":
            names.pop(path, None)
    process = [content[names[target]]]
    machine = []
    for view in (names, durable):
        inode = view[target]
        whole, kept = content[inode], synced.get(inode, b"")
        torn = kept + whole[len(kept) : (len(kept) + len(whole)) // 2]
        machine += [whole, kept, torn, torn + bytes(len(whole) - len(torn))]
    return process, machine


@pytest.fixture
def small_pieces(monkeypatch):
    """Arrays of more than 64 bytes are written and read as large ones are: in pieces, with a CRC that is combined."""
    monkeypatch.setattr(npz, "PIECE", 64)
    monkeypatch.setattr(checksums, "PIECE", 64)


@needs_linux
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_every_prefix_of_a_save_gives_the_old_or_the_new(name, durable, tmp_path, monkeypatch):
    target = tmp_path / name
    save(1, target)
    old = target.read_bytes()
    with monkeypatch.context() as patches:
        recorder = Recorder(patches, tmp_path)
        save(2, target, durable)
    operations = recorder.operations
    kinds = [kind for kind, *_ in operations]
    assert kinds.count("rename") == 1
    assert ("sync" in kinds) == durable
    assert len(operations) > (20 if name == "s.npz" else 1)
    results, known = set(), {}
    for length in range(len(operations) + 1):
        process, machine = after_a_crash(operations[:length], str(target), old)
        for content in process + (machine if durable else []):
            if content not in known:
                (tmp_path / f"crashed-{name}").write_bytes(content)
                known[content] = found_in(tmp_path / f"crashed-{name}")
            results.add(known[content])
            if length == len(operations):
                assert known[content] == 2  # what has returned is there to stay
    assert results == {1, 2}


@needs_linux
def test_a_folder_becomes_current_at_one_moment(tmp_path, monkeypatch):
    """At every rename and sync a copy of the folder loads; what the root then names has been synced."""
    target, results, synced = tmp_path / "s.zarr", [], set()
    save(1, target)
    fsync, replace = os.fsync, os.replace

    def still_there(source, path):  # other chunks are written and renamed meanwhile
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(source, path)

    def look():
        copy = tmp_path / f"copy-{len(results)}.zarr"
        shutil.copytree(target, copy, copy_function=still_there)
        results.append(copy)

    def recorded_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        look()

    def recorded_replace(source, path, **options):
        look()
        if Path(path) == target / "zarr.json":
            new = max((p for p in target.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
            assert {str(p) for p in new.rglob("*")} | {str(source)} <= synced
        replace(source, path, **options)
        look()

    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", recorded_fsync)
        patches.setattr(os, "replace", recorded_replace)
        save(2, target)
    found = [found_in(copy) for copy in results]
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert found_in(target) == 2
    assert sum(path.is_dir() for path in target.iterdir()) == 1


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("case", ["killed", "no space", "interrupted"])
def test_processes_that_die_while_saving(case, tmp_path):
    """120 kills; files that may not grow; interrupts while HDF5 writes."""
    command = [sys.executable, str(TESTS / "helpers" / "dying.py"), case, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": PATHS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == case, (done.returncode, done.stderr[-3000:])


class Failing:
    """A file that fails at one write and at all that follow."""

    def __init__(self, file, counter, error):
        self.file, self.counter, self.error = file, counter, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.counter[0] -= 1
        if self.counter[0] < 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.file.write(data)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_every_write_that_fails(error, tmp_path, monkeypatch):
    target = tmp_path / "s.npz"
    save(1, target)
    for allowed in range(200):
        counter = [allowed]

        def opened(path, mode, counter=counter):
            file = builtins.open(path, mode)
            return Failing(file, counter, error) if "w" in mode else file

        with monkeypatch.context() as patches:
            patches.setattr(npz, "open", opened, raising=False)
            try:
                save(2, target)
            except OSError as caught:
                assert caught.errno == error
                assert found_in(target) == 1
                assert os.listdir(tmp_path) == ["s.npz"]
            else:
                break
    assert allowed > 20
    assert found_in(target) == 2


@needs_linux
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("name", [*FILES, "s.zarr"])
def test_calls_that_fail(call, name, tmp_path, monkeypatch):
    save(1, tmp_path / name)

    def fail(*given, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patches:
        patches.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output"):
            save(2, tmp_path / name)
    assert found_in(tmp_path / name) == 1
    assert os.listdir(tmp_path) == [name]


def damages(path, stride):
    """Flip a bit in a file, then cut it short, at every so many bytes; yield what was done while it is so.

    The file is changed where it lies: to empty and rewrite it takes milliseconds on some file systems.
    """
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position in range(0, len(whole), stride):
            for byte in (whole[position] ^ 1 << random.Random(position).randrange(8), whole[position]):
                file.seek(position)
                file.write(bytes([byte]))
                if byte != whole[position]:
                    yield "flipped"
        for position in reversed(range(0, len(whole), stride)):
            file.truncate(position)
            yield "cut"


@pytest.mark.parametrize(
    ("name", "stride"), [("s.npz", 1), ("s.safetensors", 1), ("s.h5", 7), ("s.zarr.zip", 67), ("in pieces.npz", 5)]
)
def test_every_flipped_byte_and_every_truncation(name, stride, tmp_path, request):
    """An error that names the file, or the same data; all bytes, and of the slow ones a sample."""
    if name == "in pieces.npz":
        request.getfixturevalue("small_pieces")
    optimizer = AdamW(0.25)
    optimizer.build({"a": np.arange(30, dtype=np.float32) if "pieces" in name else np.arange(3, dtype=np.float32)})
    path = tmp_path / name
    optimizer.save(path, extra="x", variables=True)
    saved, size, caught = archive.read(path), path.stat().st_size, 0
    for damage in damages(path, stride):
        try:
            found = archive.read(path)
        except CorruptFileError as error:
            assert name in str(error)
            caught += 1
            continue
        assert damage == "flipped"
        assert found.document == saved.document
        assert list(found.arrays) == list(saved.arrays)
        for key, array in saved.arrays.items():
            np.testing.assert_array_equal(found.arrays[key], array, strict=True)
    assert caught > size // stride


def test_every_file_of_a_folder_damaged_or_missing(tmp_path):
    path = tmp_path / "s.zarr"
    save(1, path)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        for content in (None, b"", whole[:-1], whole[: len(whole) // 2], whole[:-2] + b"\xf7" + whole[-1:]):
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            try:
                assert found_in(path) == 1
            except CorruptFileError as error:
                assert "s.zarr" in str(error)
        file.write_bytes(whole)
    assert found_in(path) == 1


def interrupted_at(path, monkeypatch, error):
    """Save, and fail where the folder's own entry is synced: the new generation is current by then."""
    from adamw_numba.saving.stores import zarr

    def fail(folder):
        raise error

    with monkeypatch.context() as patches:
        patches.setattr(zarr, "sync", fail)
        with pytest.raises(type(error)):
            save(2, path)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_a_failure_after_the_switch_keeps_what_is_current(error, tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    save(1, path)
    interrupted_at(path, monkeypatch, error)
    assert found_in(path) == 2
    save(3, path)
    assert found_in(path) == 3
    assert sum(entry.is_dir() for entry in path.iterdir()) == 1


def test_two_writers_of_one_folder(tmp_path):
    """Each begins while the other writes: the last prevails, and nothing stays behind."""
    path = tmp_path / "s.zarr"
    save(1, path)
    with targets.writing(path, True) as store:
        for key, array in {**archive.read(path).arrays}.items():
            store[key] = array
        save(2, path)  # the other begins later and ends sooner
        assert found_in(path) == 2
        document = {k: v for k, v in archive.describe(path).items() if k != "crc32"} | {"extra": 1}
        store[npz.MANIFEST] = np.frombuffer(manifest.encode(document), np.uint8)
    assert archive.describe(path)["extra"] == 1
    save(3, path)
    assert found_in(path) == 3
    assert sum(entry.is_dir() for entry in path.iterdir()) == 1


@pytest.mark.parametrize("kind", ["folder", "store", "files"])
def test_data_of_others_is_left_alone(kind, tmp_path):
    import zarr

    path = tmp_path / "s.zarr"
    target = zarr.storage.MemoryStore() if kind == "store" else path
    if kind == "files":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        zarr.create_array(target, name="mine", data=np.ones(3), zarr_format=3)
    with pytest.raises(ValueError, match=r"holds \['mine.*adamw_numba.*empty place"):
        optimizer_of(1).save(target)
    if kind == "folder":  # put beside ours, it stays
        shutil.rmtree(path)
        save(1, path)
        zarr.create_array(path / "mine", data=np.ones(3))
        zarr.create_array(path / "0123456789abcdef0123456789abcdef", data=np.ones(3))
        save(2, path)
        assert found_in(path) == 2
        assert len(list(path.iterdir())) == 4


@pytest.mark.parametrize("name", [*FILES, "s.zarr"])
def test_what_an_interrupt_has_left_is_cleared_away(name, tmp_path, monkeypatch):
    """Though its process, this one, lives on; and a generation of which half is removed."""
    mark = f"{atomic._here()}.{os.getpid()}.0123456789abcdef"
    save(1, tmp_path / name)
    if name == "s.zarr":
        left = tmp_path / name / f"adamw_numba.{mark}"
        (left / "momentum").mkdir(parents=True)
    else:
        left = tmp_path / f".s.{mark}.tmp.{name.partition('.')[2]}"
        left.write_bytes(b"")
    save(2, tmp_path / name)
    assert not left.exists()


@needs_linux
@pytest.mark.parametrize("name", [*FILES, "s.zarr"])
def test_a_link_is_followed_and_the_mode_kept(name, tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / name, tmp_path / name
    save(1, real)
    link.symlink_to(real)
    mode = 0o600 if name != "s.zarr" else 0o700
    real.chmod(mode)
    save(2, link)
    assert link.is_symlink()
    assert found_in(real) == 2
    assert real.stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path / "real") == [name]
