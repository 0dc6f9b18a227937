"""Addresses of many arrays in one compiled call, read from the arrays' own headers.

Asking an array from Python where it lies takes a fifth of a microsecond or more, and whether anything else has changed
takes longer: of a small step that is most. Compiled code compares everything at once. A NumPy array's header is the
``PyArrayObject_fields`` of NumPy's C API, whose layout NumPy promises to keep; Numba reads it too. A torch tensor
describes itself through DLPack's C exchange API, where its type offers that (torch 2.10 on): a ``DLTensor``, filled in
without a call of Python. Of a CuPy array, cupy_header.py has found where everything stands. What is known of each array
lies in one row of int64 (see `record`); an array that is not exactly as known is left to the slower check in table.py.
"""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from ..update import G
from . import cupy_header
from .compiled import cached, call_plain, entry_point, jit, jit_for_python, words_at

_HEAD = object.__basicsize__  # bytes of PyObject_HEAD, whose last word is the type
_WORD = 8
_ITEMS = _HEAD + _WORD  # of a list: after its size
_DATA, _NDIM, _SHAPE, _STRIDES, _DTYPE, _FLAGS = 0, 1, 2, 3, 5, 6  # words of NumPy's header
_DEVICE, _KIND, _DL_SHAPE, _DL_STRIDES, _OFFSET, _DL_WORDS = 1, 2, 3, 4, 5, 6  # words of a DLTensor
_LOW32 = 0xFFFFFFFF
ALIGNED, WRITEABLE = 0x100, 0x400
# A record: EXPORTER is 0 for NumPy's arrays and -1 for CuPy's, whose FLAGS are the device. Of a tensor, DTYPE holds
# dtype and number of axes, FLAGS the device, strides count elements.
TYPE, EXPORTER, DTYPE, FLAGS, LOW, HIGH, NDIM, AXES = range(8)
# A reader: addresses and sizes.
(
    OWNED,
    OWNED_COUNT,
    PLACES,
    GRADIENTS,
    KNOWN,
    STARTS,
    LOWS,
    HIGHS,
    RANGES,
    TABLE,
    NONE,
    CLEAR,
    TENSOR,
    FIELDS,
    REFERENCES,
    NEW,
    WATCHED,
) = range(17)
_MISSING = _CUPY = _SAME = -1
_BLOCK_WORDS = 17
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
    if cupy_header.fields(type(array)) is not None:
        known[EXPORTER], known[DTYPE], known[FLAGS] = _CUPY, id(array.dtype), array.data.device_id
        return [*known, *layout.shape, *layout.strides]
    known[EXPORTER] = exporter(type(array))
    found = (ctypes.c_int64 * _DL_WORDS)()
    if not known[EXPORTER] or not describe(id(array), known[EXPORTER], ctypes.addressof(found), CLEAR_ERROR):
        return UNSEEN
    known[FLAGS], known[DTYPE] = found[_DEVICE], found[_KIND]
    return [*known, *layout.shape, *(stride // array.element_size() for stride in layout.strides)]


def exporter(kind: type) -> int:
    """The function of DLPack's C exchange API that describes an array of a type; 0 where there is none."""
    # The header's version and older table, then three functions before `dltensor_from_py_object_no_sync`.
    return _exchange_function(kind, 5)


def stream_function(kind: type) -> int:
    """The function of that API that tells the current stream of a type's library; 0 where there is none."""
    return _exchange_function(kind, 6)


def _exchange_function(kind: type, position: int) -> int:
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    address = _capsule_pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(address).value
    return int(ctypes.c_int64.from_address(address + position * _WORD).value or 0) if major == 1 else 0


def _cupy_fields(arrays: Sequence[Any]) -> Any:
    """Where CuPy's arrays keep what they are; anything else where there are none."""
    found = [cupy_header.fields(kind) for kind in set(map(type, arrays))]
    return next((fields for fields in found if fields is not None), np.zeros(cupy_header.FIELDS, np.int64))


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
    references : list of weakref.ref, None and False
        To each gradient that was looked at; None where it was not, False where nobody asks if it is the same object.

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
        references: Sequence[Any],
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
            FIELDS: _cupy_fields(owned),
            REFERENCES: np.array([_SAME if r is False else 0 if r is None else id(r) for r in references], np.int64),
        }
        self._references = references  # alive, so that they can be looked into
        self._block = np.zeros(_BLOCK_WORDS, np.int64)
        for entry, array in self._arrays.items():
            self._block[entry] = array.ctypes.data
        self._block[OWNED_COUNT], self._block[GRADIENTS] = len(owned), len(gradient_records)
        self._block[WATCHED] = len(owned)
        self._block[RANGES] = ranges.shape[1]
        self._block[NONE], self._block[CLEAR] = id(None), CLEAR_ERROR
        self.address = int(self._block.ctypes.data)
        self.count = len(gradient_records)

    def watch(self, count: int) -> None:
        """Compare only so many of the arrays that a step writes, the first ones, from now on."""
        self._block[WATCHED] = count

    @property
    def has_new(self) -> bool:
        """Whether a gradient was another object than the one that was looked at, or had moved: until it is set back."""
        return bool(self._block[NEW])

    @has_new.setter
    def has_new(self, value: bool) -> None:
        self._block[NEW] = value


@intrinsic
def _describe(typingctx, function, array, tensor):
    """The exporter: ``int(PyObject *, DLTensor *)``, 0 where it succeeds."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [word, word]).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), word)

    return types.int64(types.intp, types.intp, types.intp), codegen


@jit_for_python
def describe(array, exporter, tensor, clear):
    """Have a tensor fill in a DLTensor; False, and no exception set, where it cannot."""
    if _describe(exporter, array, tensor) == 0:
        return True
    call_plain(clear)
    return False


@jit
def _address_as_known(array, known, block):
    """Where an array lies, if it is exactly as known."""
    # The type first: what follows reads a header whose layout only this type is known to have.
    if words_at(array + _HEAD - _WORD)[0] != known[TYPE]:
        return _MISSING
    ndim = known[NDIM]
    if known[EXPORTER] == 0:
        header = words_at(array + _HEAD)
        same = header[_DTYPE] == known[DTYPE] and header[_NDIM] & _LOW32 == ndim
        same &= header[_FLAGS] & known[FLAGS] == known[FLAGS]  # a view is made read-only by a flag alone
        data, shape, strides = header[_DATA], header[_SHAPE], header[_STRIDES]
    elif known[EXPORTER] == _CUPY:
        fields = words_at(block[FIELDS])
        memory = words_at(array + fields[cupy_header.MEMORY])[0]
        ends = words_at(array + fields[cupy_header.SHAPE])  # of a vector of C++
        shape, strides = ends[0], words_at(array + fields[cupy_header.STRIDES])[0]
        same = words_at(array + fields[cupy_header.DTYPE])[0] == known[DTYPE] and ends[1] - shape == _WORD * ndim
        same &= words_at(memory + fields[cupy_header.DEVICE])[0] & _LOW32 == known[FLAGS]
        data = words_at(memory + fields[cupy_header.ADDRESS])[0]
    else:
        if not describe(array, known[EXPORTER], block[TENSOR], block[CLEAR]):
            return _MISSING
        header = words_at(block[TENSOR])
        same = header[_KIND] == known[DTYPE] and header[_DEVICE] == known[FLAGS] and header[_OFFSET] == 0
        data, shape, strides = header[_DATA], header[_DL_SHAPE], header[_DL_STRIDES]
    if not same or (data == 0 and known[HIGH] > known[LOW]):
        return _MISSING
    for axis in range(ndim):
        same &= words_at(shape)[axis] == known[AXES + axis]
        same &= words_at(strides)[axis] == known[AXES + ndim + axis]
    return data if same else _MISSING


@jit
def _is_apart(block, low, high):
    """Whether memory overlaps none that a step writes."""
    first, last = 0, block[RANGES]
    lows, highs = words_at(block[LOWS]), words_at(block[HIGHS])
    while first < last:  # to the first range that ends above
        middle = (first + last) >> 1
        if highs[middle] > low:
            last = middle
        else:
            first = middle + 1
    return first == block[RANGES] or lows[first] >= high or low == high


@entry_point
@cached(types.intp(types.intp, types.intp))
def read(gradients, address):
    """Put the gradients' addresses into the table; return how many there are, or -1 where a closer look is needed.

    `gradients` is the address of a list of as many as the reader expects, `address` that of the reader. The
    interpreter's lock is held.
    """
    block = words_at(address)
    owned, places, table = words_at(block[OWNED]), words_at(block[PLACES]), words_at(block[TABLE])
    starts, known, references = words_at(block[STARTS]), block[KNOWN], words_at(block[REFERENCES])
    count = block[GRADIENTS]
    present = new = 0
    for k in range(block[WATCHED]):  # an owned array that has moved needs new ranges, and a new check for overlap
        if _address_as_known(owned[k], words_at(known + _WORD * starts[k]), block) != table[places[k]]:
            return _MISSING
    items = words_at(words_at(gradients + _ITEMS)[0])
    for i in range(count):
        before = table[G * count + i]
        table[G * count + i] = 0
        if items[i] == block[NONE]:
            continue
        row = words_at(known + _WORD * starts[block[OWNED_COUNT] + i])
        data = _address_as_known(items[i], row, block)
        if data == _MISSING or not _is_apart(block, data + row[LOW], data + row[HIGH]):
            return _MISSING
        table[G * count + i] = data
        present += 1
        if references[i] != _SAME:
            # A weak reference holds the address of its object, right after what every object has, while that lives.
            is_same = references[i] != 0 and words_at(references[i] + _HEAD)[0] == items[i]
            new |= not is_same or data != before
    block[NEW] |= new
    return present


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
CLEAR_ERROR: int = ctypes.cast(ctypes.pythonapi.PyErr_Clear, ctypes.c_void_p).value or 0
