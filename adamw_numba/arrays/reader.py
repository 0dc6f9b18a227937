"""Addresses of many arrays in one compiled call, read from the arrays' own headers.

Asking an array from Python where it lies takes a fifth of a microsecond or more, and whether anything else has changed
takes longer: of a small step that is most. Compiled code compares everything at once. A NumPy array's header is the
``PyArrayObject_fields`` of NumPy's C API, whose layout NumPy promises to keep; Numba reads it too. A torch tensor
describes itself through DLPack's C exchange API, where its type offers that (torch 2.10 on): a ``DLTensor``, filled in
without a call of Python. What is known of each array lies in one row of int64 (see `record`); an array that is not
exactly as known is left to the slower check in table.py.
"""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.extending import intrinsic

from ..update import G
from .compiled import cached, call_plain, entry_point, first_above, jit, jit_for_python, pointer

_HEAD = object.__basicsize__  # bytes of PyObject_HEAD, whose last word is the type
_WORD = 8
_ITEMS = _HEAD + _WORD  # of a list: after its size
_DATA, _NDIM, _SHAPE, _STRIDES, _DTYPE, _FLAGS = 0, 1, 2, 3, 5, 6  # words of NumPy's header
_DEVICE, _KIND, _DL_SHAPE, _DL_STRIDES, _OFFSET, _DL_WORDS = 1, 2, 3, 4, 5, 6  # words of a DLTensor
_LOW32 = 0xFFFFFFFF
ALIGNED, WRITEABLE = 0x100, 0x400
# A record: of a tensor, DTYPE holds dtype and number of axes, FLAGS the device, strides count elements.
TYPE, EXPORTER, DTYPE, FLAGS, LOW, HIGH, NDIM, AXES = range(8)
# A reader: addresses and sizes.
OWNED, OWNED_COUNT, PLACES, GRADIENTS, KNOWN, STARTS, LOWS, HIGHS, RANGES, TABLE, NONE, CLEAR, TENSOR = range(13)
_MISSING = -1
UNSEEN = [0] * AXES  # equals no array: no type lies at address 0


def record(array: Any, layout: Any, low: int, high: int, flags: int) -> list[int]:
    """What is known of an array: its type, dtype, what its flags must hold, extent relative to its address, shape."""
    if config.DISABLE_JIT:  # `read` is not compiled
        return UNSEEN
    known = [id(type(array)), 0, 0, flags, low, high, len(layout.shape)]
    if isinstance(array, np.ndarray):
        # Equal dtypes may be two objects; then the array is compared by the slower check, which is as right.
        known[DTYPE] = id(array.dtype)
        return [*known, *layout.shape, *layout.strides]
    known[EXPORTER] = exporter(type(array))
    found = (ctypes.c_int64 * _DL_WORDS)()
    if not known[EXPORTER] or not describe(id(array), known[EXPORTER], ctypes.addressof(found), _CLEAR):
        return UNSEEN
    known[FLAGS], known[DTYPE] = found[_DEVICE], found[_KIND]
    return [*known, *layout.shape, *(stride // array.element_size() for stride in layout.strides)]


def exporter(kind: type) -> int:
    """The function of DLPack's C exchange API that describes an array of a type; 0 where there is none."""
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    address = _capsule_pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(address).value
    # The header's version and older table, then three functions before `dltensor_from_py_object_no_sync`.
    return int(ctypes.c_int64.from_address(address + 5 * _WORD).value) if major == 1 else 0


class Reader:
    """The arrays that a step reads and writes, as `read` compares them with what is known.

    Parameters
    ----------
    owned : list of arrays
        What a step writes; the caller keeps them alive.
    places : pair of arrays of int
        Their rows and columns in the table of addresses.
    owned_records, gradient_records : list of list of int
        What is known of each, and of the gradient of each column (see `record`).
    ranges : array of int64, shape (2, n)
        The beginnings and ends of the memory that a step writes, in order.
    table : array of int64

    Attributes
    ----------
    address : int
        Of what `read` needs.
    count : int
        How many gradients there are.
    """

    def __init__(
        self,
        owned: Sequence[Any],
        places: tuple[Any, Any],
        owned_records: Sequence[list[int]],
        gradient_records: Sequence[list[int]],
        ranges: Any,
        table: Any,
    ) -> None:
        records = [*owned_records, *gradient_records]
        self._arrays = {
            OWNED: np.fromiter(map(id, owned), np.int64, len(owned)),
            PLACES: places[0] * np.int64(table.shape[1]) + places[1],
            KNOWN: np.fromiter(chain.from_iterable(records), np.int64),
            STARTS: np.cumsum([0, *map(len, records)]),
            LOWS: ranges[0].copy(),
            HIGHS: ranges[1].copy(),
            TABLE: table,
            TENSOR: np.zeros(_DL_WORDS, np.int64),
        }
        self._block = np.zeros(13, np.int64)
        for entry, array in self._arrays.items():
            self._block[entry] = array.ctypes.data
        self._block[OWNED_COUNT], self._block[GRADIENTS] = len(owned), len(gradient_records)
        self._block[RANGES] = ranges.shape[1]
        self._block[NONE], self._block[CLEAR] = id(None), _CLEAR
        self.address = int(self._block.ctypes.data)
        self.count = len(gradient_records)


@intrinsic
def _describe(typingctx, function, array, tensor):
    """The exporter: ``int(PyObject *, DLTensor *)``, 0 where it succeeds."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [word, word]).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), word)

    return types.int64(types.intp, types.intp, types.intp), codegen


@jit
def _words(address, count):
    return carray(pointer(address, np.int64(0)), count)


@jit_for_python
def describe(array, exporter, tensor, clear):
    """Have a tensor fill in a DLTensor; False, and no exception set, where it cannot."""
    if _describe(exporter, array, tensor) == 0:
        return True
    call_plain(clear)
    return False


@jit
def _address_as_known(array, known, tensor, clear):
    """Where an array lies, if it is exactly as known."""
    # The type first: what follows reads a header whose layout only this type is known to have.
    if _words(array + _HEAD - _WORD, 1)[0] != known[TYPE]:
        return _MISSING
    ndim = known[NDIM]
    if known[EXPORTER] == 0:
        header = _words(array + _HEAD, 7)
        same = header[_DTYPE] == known[DTYPE] and header[_NDIM] & _LOW32 == ndim
        same &= header[_FLAGS] & known[FLAGS] == known[FLAGS]  # a view is made read-only by a flag alone
        shape, strides = header[_SHAPE], header[_STRIDES]
    else:
        if not describe(array, known[EXPORTER], tensor, clear):
            return _MISSING
        header = _words(tensor, _DL_WORDS)
        same = header[_KIND] == known[DTYPE] and header[_DEVICE] == known[FLAGS] and header[_OFFSET] == 0
        shape, strides = header[_DL_SHAPE], header[_DL_STRIDES]
    if not same or (header[_DATA] == 0 and known[HIGH] > known[LOW]):
        return _MISSING
    for axis in range(ndim):
        same &= _words(shape, ndim)[axis] == known[AXES + axis]
        same &= _words(strides, ndim)[axis] == known[AXES + ndim + axis]
    return header[_DATA] if same else _MISSING


@jit
def _is_apart(lows, highs, low, high):
    nearest = first_above(highs, low)
    return nearest == lows.size or lows[nearest] >= high or low == high


@entry_point
@cached(njit, types.intp(types.intp, types.intp))
def read(gradients, address):
    """Put the gradients' addresses into the table; return how many there are, or -1 where a closer look is needed.

    `gradients` is the address of a list of as many as the reader expects, `address` that of the reader. The
    interpreter's lock is held.
    """
    block = _words(address, 13)
    owned, table, starts = _words(block[OWNED], block[OWNED_COUNT]), _words(block[TABLE], 1), block[STARTS]
    count, tensor, clear = block[GRADIENTS], block[TENSOR], block[CLEAR]
    starts = _words(starts, owned.size + count + 1)
    known, places = _words(block[KNOWN], starts[owned.size + count]), _words(block[PLACES], owned.size)
    table = _words(block[TABLE], 8 * count)
    lows, highs = _words(block[LOWS], block[RANGES]), _words(block[HIGHS], block[RANGES])
    present = 0
    for k in range(owned.size):  # an owned array that has moved needs new ranges, and a new check for overlap
        if _address_as_known(owned[k], known[starts[k] :], tensor, clear) != table[places[k]]:
            return _MISSING
    items = _words(_words(gradients + _ITEMS, 1)[0], count)
    for i in range(count):
        table[G * count + i] = 0
        if items[i] == block[NONE]:
            continue
        row = known[starts[owned.size + i] :]
        data = _address_as_known(items[i], row, tensor, clear)
        if data == _MISSING or not _is_apart(lows, highs, data + row[LOW], data + row[HIGH]):
            return _MISSING
        table[G * count + i] = data
        present += 1
    return present


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_CLEAR: int = ctypes.cast(ctypes.pythonapi.PyErr_Clear, ctypes.c_void_p).value or 0
