"""Where an array lies in memory: address, shape, strides, and which bytes it shares with others."""

import ctypes
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from . import gpu
from .library import ITEMSIZE, Array, dtype_name

_TENSOR_TYPES: set[type] = set()  # those met so far; looking here is faster than asking array_api_compat
_NDARRAYS = {np.ndarray, np.memmap}
_ALIGNED_WRITEABLE = 0x500  # of NumPy's flags
_OF_TENSOR = operator.attrgetter("dtype", "device", "shape", "is_leaf")
_DATA = object.__basicsize__  # of NumPy's header: where the address stands, right after what every object has


class Layout(NamedTuple):
    """Where an array lies, on the host or on a GPU: address and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def layout_of(array: Array) -> Layout:
    """Read the layout of a NumPy array, of a torch tensor, or of any array on a GPU."""
    if isinstance(array, np.ndarray):
        return Layout(_data(array), array.shape, array.strides, dtype_name(array))
    if not array_api_compat.is_torch_array(array):
        return Layout(*gpu.layout(array))
    size = array.element_size()
    strides = tuple(stride * size for stride in array.stride())
    return Layout(array.data_ptr(), tuple(array.shape), strides, dtype_name(array))


def address(array: Array) -> int:
    """Where an array with compiled kernels lies now."""
    if type(array) in _NDARRAYS:
        return _data(array)
    if type(array) in _TENSOR_TYPES:
        return int(array.data_ptr())
    return layout_of(array).address


def memory(array: Array) -> tuple[int, int]:
    """Where an array lies, and, of a tensor, how many bytes its storage holds."""
    if type(array) in _NDARRAYS:
        return _data(array), 0
    if array_api_compat.is_torch_array(array):
        return array.data_ptr(), array.untyped_storage().nbytes()
    return layout_of(array).address, 0


def signature(array: Array) -> object:
    """Everything that a check of an array depends on, except for its address; None if it cannot be read quickly."""
    kind = type(array)
    if kind in _NDARRAYS:
        return kind, array.dtype, array.shape, array.strides, array.flags.num & _ALIGNED_WRITEABLE
    if kind not in _TENSOR_TYPES:
        if gpu.is_numba(array):
            return gpu.signature(array)
        if array_api_compat.is_cupy_array(array):
            return kind, array.dtype, array.shape, array.strides, array.data.device_id
        if not array_api_compat.is_torch_array(array):
            return gpu.signature(array) if gpu.is_cuda_array(array) else None
        _TENSOR_TYPES.add(kind)
    try:
        # A storage that is resized leaves shape and strides of its tensors as they were.
        held = array.untyped_storage().nbytes(), array.storage_offset()
        return kind, *_OF_TENSOR(array), array.stride(), array.is_conj(), array.is_neg(), held
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no strides, a fake one no storage
        return None


def extent(layout: Layout) -> tuple[int, int]:
    """The first byte of an array and the one after its last; the same twice for an empty one."""
    low = high = layout.address
    for size, stride in zip(layout.shape, layout.strides, strict=True):
        if size == 0:
            return layout.address, layout.address
        if stride < 0:
            low += stride * (size - 1)
        else:
            high += stride * (size - 1)
    return low, high + ITEMSIZE[layout.dtype]


def share_memory(one: Layout, other: Layout) -> bool:
    """Whether two arrays have a byte in common: exact, or True where that is too hard to tell."""
    (low, high), (other_low, other_high) = extent(one), extent(other)
    if low >= other_high or other_low >= high or low == high or other_low == other_high:
        return False
    # Extents that cross are not enough: the columns of a matrix lie between each other. The exact answer can take
    # exponential time, so that the search is given up where it is hard, which no ordinary layout is.
    try:
        return bool(np.shares_memory(_shadow(one), _shadow(other), max_work=100_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _data(array: np.ndarray[Any, Any]) -> int:
    """Where a NumPy array lies, from its header (see reader.py); `array.ctypes` makes four objects to say the same."""
    return ctypes.c_ssize_t.from_address(id(array) + _DATA).value


def _shadow(layout: Layout) -> np.ndarray[Any, Any]:
    """An array over the same bytes, of any library: compared, never read."""
    interface = {
        "data": (layout.address, True),
        "shape": layout.shape,
        "strides": layout.strides,
        "typestr": f"|V{ITEMSIZE[layout.dtype]}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def is_c_contiguous(array: Array) -> bool:
    """Whether the elements lie next to each other, in the order of the axes."""
    layout = layout_of(array)
    expected = ITEMSIZE[layout.dtype]
    for size, stride in zip(reversed(layout.shape), reversed(layout.strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in layout.shape
        expected *= size
    return True


def is_aligned(array: Array) -> bool:
    layout = layout_of(array)
    return layout.address % min(ITEMSIZE.get(layout.dtype, 1), 8) == 0


def overlaps_itself(layout: Layout) -> bool:
    """True unless each axis steps over all that the axes with smaller strides span."""
    if 0 in layout.shape:
        return False
    axes = sorted((abs(stride), size) for size, stride in zip(layout.shape, layout.strides, strict=True) if size > 1)
    span = ITEMSIZE[layout.dtype]
    for stride, size in axes:
        if stride < span:
            return True
        span += stride * (size - 1)
    return False
