"""The arithmetic of one element, compiled by Numba, and the runs of elements that it is for."""

import math

import numpy as np
from numba import carray, types
from numba.extending import overload
from numpy.lib.stride_tricks import as_strided

from ..arrays.compiled import jit, pointer
from ..update import make_update
from .blocks import LENGTH, STEP
from .intrinsics import muladd

update = jit(make_update(math.sqrt, np.maximum, np.minimum, muladd))


def row_of(address, count, step, like, strided):
    """The elements at an address: a pointer, or an array where there are some bytes between them."""
    raise NotImplementedError


@overload(row_of)
def _overload_row_of(address, count, step, like, strided):
    if isinstance(strided, (types.NoneType, types.Omitted)):
        return lambda address, count, step, like, strided: pointer(address, like)
    return lambda address, count, step, like, strided: as_strided(carray(pointer(address, like), 1), (count,), (step,))


def slot_of(exists, address, count, step, like, strided):
    """The same of a slot; None where there is none."""
    raise NotImplementedError


@overload(slot_of)  # with `if exists is None`, Numba would make it an array that may be None, wherever it is used
def _overload_slot_of(exists, address, count, step, like, strided):
    if isinstance(exists, (types.NoneType, types.Omitted)):
        return lambda exists, address, count, step, like, strided: None
    return lambda exists, address, count, step, like, strided: row_of(address, count, step, like, strided)


def operand(exists, record, row, like, strided, first=0):
    """One operand from an element on, by a record (see blocks.py)."""
    raise NotImplementedError


@overload(operand)
def _overload_operand(exists, record, row, like, strided, first=0):
    if isinstance(exists, (types.NoneType, types.Omitted)):
        return lambda exists, record, row, like, strided, first=0: None
    return lambda exists, record, row, like, strided, first=0: row_of(
        record[row] + first * record[STEP + row], record[LENGTH] - first, record[STEP + row], like, strided
    )
