"""A variable's number on a GPU: what it holds itself, with a master copy, or with the remainder of one.

These are parts, like those of kernels.py, which puts them together.
"""

from functools import cache

from numba import cuda, types

from ..arrays.masters import make_splitting
from ..update import Storage
from . import memory
from .memory import FLOATS, SIZES, bits_of, choose, device_function, number_of, scalar_function, unsigned

_split, _joined, _ = make_splitting(scalar_function, unsigned, bits_of, number_of, choose)


def is_halved(storage: Storage) -> bool:
    """Whether a master has half the bytes of other slots."""
    return storage.master == "remainder"


def size_of(storage: Storage) -> int:
    """Bytes of one master."""
    return SIZES[storage.compute] >> is_halved(storage)


@cache
def reading_and_writing(storage: Storage, width: int):
    """Functions that read and write the numbers of neighbours of a variable."""
    if is_halved(storage):
        return _in_two_parts(width)
    load, store = memory.elements(storage.p, width, False)
    load_master, store_master = memory.elements(storage.compute, width, True)
    dtype, rounded = FLOATS[storage.compute], memory.rounded(storage.p)

    @scalar_function
    def read(p, at):
        load(p, at.p)

    @scalar_function
    def write(p, at):
        store(p, at.p)

    @device_function
    def read_master(p, at):
        master = cuda.local.array(width, dtype)
        load(p, at.p)
        load_master(master, at.master)
        for k in range(width):
            if rounded(master[k]) == p[k]:  # otherwise the owner has written the variable since
                p[k] = master[k]

    @scalar_function
    def write_master(p, at):
        store(p, at.p)
        store_master(p, at.master)

    return (read_master, write_master) if storage.master else (read, write)


def _in_two_parts(width):
    load, store = memory.codes(16, width, False)
    load_remainders, store_remainders = memory.codes(16, width, True)

    @device_function
    def read(p, at):
        uppers, remainders = cuda.local.array(width, types.uint32), cuda.local.array(width, types.uint32)
        load(uppers, at.p)
        load_remainders(remainders, at.master)
        for k in range(width):
            p[k] = _joined(unsigned(uppers[k]), unsigned(remainders[k]))

    @device_function
    def write(p, at):
        uppers, remainders = cuda.local.array(width, types.uint32), cuda.local.array(width, types.uint32)
        for k in range(width):
            uppers[k], remainders[k] = _split(p[k])
        store(uppers, at.p)
        store_remainders(remainders, at.master)

    return read, write
