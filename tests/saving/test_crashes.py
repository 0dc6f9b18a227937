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

from adamw_numba import AdamW, CorruptFileError
from adamw_numba.saving import archive, manifest
from adamw_numba.saving.stores import npz
from adamw_numba.saving.stores import targets as opening

FILES = ["s.npz", "s.safetensors", "s.h5", "s.zarr.zip"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, uses fork and resource limits")


def optimizer_of(number, size=40):
    """An optimizer whose every array holds one number."""
    variables = {"a": np.full(size, float(number), np.float32), "b": np.full((2, 3), float(number))}
    optimizer = AdamW(0.5)
    optimizer.build(variables)
    for name, array in optimizer.state.items():
        if "/" in name:
            array[...] = number
    return optimizer


def save(number, path, durable=True):
    optimizer_of(number).save(path, extra=number, variables=True, durable=durable)


def found_in(path):
    """The number that a file holds, all of it."""
    saved = archive.read(path)
    numbers = {float(x) for key, array in saved.arrays.items() if "/" in key for x in array.ravel()}
    assert numbers == {float(saved.document["extra"])}
    return saved.document["extra"]


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


@needs_linux
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


HELPER = """
import os, random, resource, signal, sys, time, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_crashes import FILES, found_in, optimizer_of, save
from adamw_numba import Checkpoints
import h5py, safetensors, zarr

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def done(work):
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1]) == 0
"""

KILLS = """
folder, random = Path({folder!r}), random.Random(5)
def saver(name):
    def work():
        number, optimizer = 1, optimizer_of(0, 20_000)
        checkpoints = Checkpoints(folder / "many", keep=2) if name == "many" else None
        while True:
            number += 1
            for key, array in [*optimizer.state.items(), *zip("ab", optimizer.trainable_variables)]:
                if array.ndim:
                    array[...] = number
            if checkpoints:
                checkpoints.save(optimizer, number, extra=number, variables=True)
            else:
                optimizer.save(folder / name, extra=number, variables=True)
    return work

def checker(name):
    def work():
        if name == "many":
            path = Checkpoints(folder / "many").latest()
            assert found_in(path) > 1
        else:
            assert found_in(folder / name) >= 1
    return work

names = [*FILES, "s.zarr", "many"]
for name in names:
    if name == "many":
        assert done(lambda: Checkpoints(folder / "many").save(optimizer_of(2), 1, extra=2, variables=True))
    else:
        assert done(lambda: save(1, folder / name)), name
kills = 0
while kills < 120:
    name = names[kills % len(names)]
    pid = child(saver(name))
    time.sleep(random.uniform(0.005, 0.12 if "zarr" not in name else 0.25))
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    kills += 1
    assert done(checker(name)), (name, kills)
for name in names:  # a later save clears away what was left
    if name not in ("many", "s.zarr"):
        assert done(lambda: save(3, folder / name)), name
assert not [n for n in os.listdir(folder) if ".tmp" in n], os.listdir(folder)
print("killed", kills)
"""

FULL = """
folder = Path({folder!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name in [*FILES, "s.zarr"]:
    assert done(lambda: save(1, folder / name)), name
    size = (folder / name).stat().st_size if "zarr" != name[2:] else 2000
    for limit in [0, 100, 513, size // 2, size - 1]:
        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(2, folder / name)
            except Exception as error:
                assert not isinstance(error, AssertionError)
                return
            assert name == "s.zarr", "nothing was raised"
        assert done(work), (name, limit)
        assert done(lambda: found_in(folder / name) in (1, 2) or sys.exit(1)), (name, limit)
        if name != "s.zarr":
            assert done(lambda: found_in(folder / name) == 1 or sys.exit(1)), (name, limit)
    assert not [n for n in os.listdir(folder) if ".tmp" in n], (name, os.listdir(folder))
print("full")
"""


@needs_linux
@pytest.mark.parametrize(("code", "word"), [(KILLS, "killed 120"), (FULL, "full")], ids=["killed", "no space"])
def test_processes_that_die_while_saving(code, word, tmp_path):
    script = (HELPER + code).format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=170)
    assert done.stdout.strip() == word, done.stderr[-3000:]


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


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_and_every_truncation(name, tmp_path):
    """An error that names the file, or the same data; all bytes, but of the slow ones a sample."""
    variables = {"a": np.arange(3, dtype=np.float32)}
    optimizer = AdamW(0.25)
    optimizer.build(variables)
    path = tmp_path / name
    optimizer.save(path, extra="x", variables=True)
    whole, saved = path.read_bytes(), archive.read(path)
    stride = {"s.zarr.zip": 67, "s.h5": 7}.get(name, 1)
    caught = 0
    for position in range(0, len(whole), stride):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << random.Random(position).randrange(8)
        for content in (bytes(flipped), whole[:position]):
            path.write_bytes(content)
            try:
                found = archive.read(path)
            except CorruptFileError as error:
                assert name in str(error)
                caught += 1
                continue
            assert content != whole[:position]
            assert found.document == saved.document
            assert list(found.arrays) == list(saved.arrays)
            for key, array in saved.arrays.items():
                np.testing.assert_array_equal(found.arrays[key], array, strict=True)
    assert caught > len(whole) // stride


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
    with opening.writing(path, True) as store:
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
    from adamw_numba.saving.stores import atomic as files

    mark = f"{files._here()}.{os.getpid()}.0123456789abcdef"
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


INTERRUPTS = """
from adamw_numba.stores import hdf5
folder, at = Path({folder!r}), 0
save(1, folder / "s.h5")
write = hdf5.Sink.write
class Counting:
    left = 0
def interrupted(sink, data):
    Counting.left -= 1
    if Counting.left == 0:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
    return write(sink, data)
hdf5.Sink.write = interrupted
stopped = 0
for at in range(1, 1000, 9):
    Counting.left = at
    try:
        save(2, folder / "s.h5")
    except KeyboardInterrupt:
        stopped += 1
        assert found_in(folder / "s.h5") == 1
        assert os.listdir(folder) == ["s.h5"]
    else:
        break
assert found_in(folder / "s.h5") == 2 and stopped > 3, (stopped, at)
print("interrupted")
"""


@needs_linux
def test_interrupts_while_hdf5_writes(tmp_path):
    script = (HELPER + INTERRUPTS).format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "interrupted", (done.returncode, done.stderr[-3000:])
