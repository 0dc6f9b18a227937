"""What test_crashes.py runs in a process of its own: ``dying.py CASE FOLDER``. Saves are killed, starved and interrupted.

Everything that is killed or limited runs in a child of this process. This process makes no zarr store: that would start
a thread, which its children would lack.
"""

import os
import random
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import h5py  # noqa: F401 - loaded once, not by each child
import safetensors  # noqa: F401
import zarr  # noqa: F401
from helpers.numbered import FILES, fill, found_in, optimizer_of, save

from adamw_numba import Checkpoints
from adamw_numba.saving.stores import hdf5

KILLS = 120


def child(work):
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return process


def done(work):
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1]) == 0


def holds(path, numbers):
    """Whether a file holds one of some numbers, in the eyes of a new process."""

    def work():
        assert found_in(path) in numbers

    return done(work)


def leftovers(folder):
    return [name for name in os.listdir(folder) if ".tmp" in name]


def save_for_ever(folder, name, begun):
    """Save one number after another; a byte into a pipe at the beginning of each save."""
    number, optimizer = 1, optimizer_of(0, 20_000)
    checkpoints = Checkpoints(folder / "many", keep=2) if name == "many" else None
    while True:
        number += 1
        fill(optimizer, number)
        os.write(begun, b".")
        if checkpoints:
            checkpoints.save(optimizer, number, extra=number, variables=True)
        else:
            optimizer.save(folder / name, extra=number, variables=True)


def kill_within_a_save(folder, name, chance, took):
    """Kill a process that saves, at some moment of a save: as long as the first one of its kind has taken, at most."""
    ready, begun = os.pipe()
    process = child(lambda: save_for_ever(folder, name, begun))
    os.close(begun)
    assert os.read(ready, 1) == b"."
    if name not in took:
        start = time.perf_counter()
        assert os.read(ready, 1) == b"."
        took[name] = time.perf_counter() - start
    time.sleep(chance * took[name])
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    os.close(ready)


def newest_is_whole(folder):
    def work():
        assert found_in(Checkpoints(folder / "many").latest()) > 1

    return done(work)


def killed(folder):
    chances, names, took = random.Random(5), [*FILES, "s.zarr", "many"], {}
    for name in names[:-1]:
        assert done(partial(save, 1, folder / name)), name
    assert done(lambda: Checkpoints(folder / "many").save(optimizer_of(2), 1, extra=2, variables=True))
    for kills in range(KILLS):
        name = names[kills % len(names)]
        kill_within_a_save(folder, name, chances.random(), took)
        assert newest_is_whole(folder) if name == "many" else holds(folder / name, range(1, 10**9)), (name, kills)
    for name in FILES:  # a later save clears away what was left
        assert done(partial(save, 3, folder / name)), name
    assert not leftovers(folder), os.listdir(folder)


def starve(folder, name, limit):
    """Save where files may not grow beyond a limit: an error, except in a folder, whose files are smaller."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(2, folder / name)
    except Exception as error:
        assert not isinstance(error, AssertionError)
        return
    assert name == "s.zarr", "nothing was raised"


def no_space(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name in [*FILES, "s.zarr"]:
        assert done(partial(save, 1, folder / name)), name
        size = (folder / name).stat().st_size if name != "s.zarr" else 2000
        for limit in [0, 100, 513, size // 2, size - 1]:
            assert done(partial(starve, folder, name, limit)), (name, limit)
            assert holds(folder / name, (1, 2) if name == "s.zarr" else (1,)), (name, limit)
        assert not leftovers(folder), (name, os.listdir(folder))


class Interrupting:
    """HDF5's writes, of which one sends an interrupt to this process."""

    def __init__(self):
        self.left, self.write = 0, hdf5.Sink.write
        hdf5.Sink.write = lambda sink, data: self.interrupted(sink, data)

    def interrupted(self, sink, data):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
            # It arrives in the main thread, which tells the sink.
            end = time.monotonic() + 5
            while sink.error is None and time.monotonic() < end:
                time.sleep(0.001)
        return self.write(sink, data)


def interrupted(folder):
    save(1, folder / "s.h5")
    writes, stopped = Interrupting(), 0
    for at in range(1, 1000, 9):
        writes.left = at
        try:
            save(2, folder / "s.h5")
        except KeyboardInterrupt:
            stopped += 1
            assert found_in(folder / "s.h5") == 1
            assert os.listdir(folder) == ["s.h5"]
        else:
            break
    assert found_in(folder / "s.h5") == 2
    assert stopped > 3, (stopped, at)


if __name__ == "__main__":
    optimizer_of(1)  # loads the kernels, for all children
    {"killed": killed, "no space": no_space, "interrupted": interrupted}[sys.argv[1]](Path(sys.argv[2]))
    print(sys.argv[1])
