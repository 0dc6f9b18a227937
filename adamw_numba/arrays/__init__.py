"""What an array is: its library, dtype, layout in memory; every check on an array that a user hands over.

Nothing here imports an array library other than NumPy: a library that made one of the arrays is already imported.
"""

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from . import gpu as gpu_arrays

Array = Any

COMPUTE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}
SLOT = COMPUTE | {"complex64": "complex64", "complex128": "complex128"}
_ARRAY_TYPES: set[type] = set()
_TENSOR_TYPES: set[type] = set()
_NDARRAYS = {np.ndarray, np.memmap}
_ALIGNED_WRITEABLE = 0x500  # of NumPy's flags
_OF_TENSOR = operator.attrgetter("dtype", "device", "shape", "is_leaf")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}


class Layout(NamedTuple):
    """Where an array lies, on the host or on a GPU: address and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def is_array(value: object) -> bool:
    """Whether a value is an array of any library (a NumPy scalar is one of no dimensions)."""
    if type(value) in _ARRAY_TYPES:
        return True
    known = isinstance(value, (np.generic, np.ndarray)) or array_api_compat.is_array_api_obj(value)
    known = known or gpu_arrays.is_cuda_array(value)
    if known:
        _ARRAY_TYPES.add(type(value))
    return known


def are_arrays(values: Iterable[object]) -> bool:
    """Whether all values are of types that were seen to be arrays'; quick, and False for a type never seen."""
    return _ARRAY_TYPES.issuperset(map(type, values))


def library(array: Array) -> str:
    """``numpy``, ``torch`` (on the CPU) and ``cuda`` go to compiled kernels, ``array_api`` to whole-array functions."""
    if isinstance(array, (np.ndarray, np.generic)):
        return "numpy"
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        return "torch"
    return "cuda" if gpu_arrays.is_cuda_array(array) else "array_api"


def place(array: Array) -> str | None:
    """Which plan an array belongs to: ``cpu``, ``cuda:0``, ...; None for arrays without compiled kernels."""
    kind = library(array)
    if kind == "cuda":
        return f"cuda:{gpu_arrays.device_index(array)}"
    return None if kind == "array_api" else "cpu"


def namespace(array: Array) -> Any:
    """The Array-API namespace of one array."""
    return array_api_compat.array_namespace(array)


def library_name(array: Array) -> str:
    """The name of the library that made an array, for messages."""
    for name in ("numpy", "torch", "jax", "cupy", "dask"):
        if getattr(array_api_compat, f"is_{name}_array")(array):
            return name
    return type(array).__module__.partition(".")[0]


def device(array: Array) -> str:
    """The device of an array, as text; of an array that is being traced, its library's word for that."""
    if library(array) == "cuda":
        return str(place(array))
    return str(array_api_compat.device(array))


def dtype_name(array: Array) -> str:
    """The name of an array's dtype, the same for every library: ``float32``, ``bfloat16``, ..."""
    name = getattr(array.dtype, "name", None)
    return name if isinstance(name, str) else str(array.dtype).rpartition(".")[2]


def byte_count(array: Array) -> int:
    """The bytes of an array's elements."""
    name = dtype_name(array)
    return int((ITEMSIZE.get(name) or np.dtype(name).itemsize) * math.prod(array.shape))


def is_mutable(array: Array) -> bool:
    """Whether an array's elements can be assigned to; JAX's and Dask's cannot."""
    if library(array) == "cuda":
        return True
    writeable = array_api_compat.is_writeable_array(array) and not array_api_compat.is_dask_array(array)
    return bool(writeable) or library(array) == "numpy"


def layout_of(array: Array) -> Layout:
    """Read the layout of a NumPy array, of a torch tensor, or of any array on a GPU."""
    if isinstance(array, np.ndarray):
        return Layout(array.ctypes.data, array.shape, array.strides, array.dtype.name)
    if not array_api_compat.is_torch_array(array):
        return Layout(*gpu_arrays.layout(array))
    size = array.element_size()
    strides = tuple(stride * size for stride in array.stride())
    return Layout(array.data_ptr(), tuple(array.shape), strides, dtype_name(array))


def address(array: Array) -> int:
    """Where an array with compiled kernels lies now."""
    if type(array) in _NDARRAYS:
        return int(array.ctypes.data)
    if type(array) in _TENSOR_TYPES:
        return int(array.data_ptr())
    return layout_of(array).address


def memory(array: Array) -> tuple[int, int]:
    """Where an array lies, and, of a tensor, how many bytes its storage holds."""
    if type(array) in _NDARRAYS:
        return array.ctypes.data, 0
    if array_api_compat.is_torch_array(array):
        return array.data_ptr(), array.untyped_storage().nbytes()
    return layout_of(array).address, 0


def writeable_copy(array: Array) -> Array:
    """The array itself, or a copy of a read-only NumPy array."""
    read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    return like(array.copy(), array) if read_only else array


def signature(array: Array) -> object:
    """All that a verdict on an array rests on, other than its address; None where that cannot be read quickly."""
    kind = type(array)
    if kind in _NDARRAYS:
        return kind, array.dtype, array.shape, array.strides, array.flags.num & _ALIGNED_WRITEABLE
    if kind not in _TENSOR_TYPES:
        if array_api_compat.is_cupy_array(array):
            return kind, array.dtype, array.shape, array.strides, array.device.id
        if not array_api_compat.is_torch_array(array):
            return gpu_arrays.signature(array) if gpu_arrays.is_cuda_array(array) else None
        _TENSOR_TYPES.add(kind)
    try:
        held = array.untyped_storage().nbytes(), array.storage_offset()
        return kind, *_OF_TENSOR(array), array.stride(), array.is_conj(), array.is_neg(), held
    except (RuntimeError, NotImplementedError):  # a sparse tensor has no strides, a fake one no storage
        return None


def extent(layout: Layout) -> tuple[int, int]:
    """The first byte of an array and the one after its last; the same twice for an empty one."""
    if 0 in layout.shape:
        return layout.address, layout.address
    reach = [stride * (size - 1) for size, stride in zip(layout.shape, layout.strides, strict=True)]
    low = layout.address + sum(min(0, r) for r in reach)
    return low, layout.address + sum(max(0, r) for r in reach) + ITEMSIZE[layout.dtype]


def share_memory(one: Layout, other: Layout) -> bool:
    """Whether two arrays have a byte in common: exact, or True where that is too hard to tell."""
    (low, high), (other_low, other_high) = extent(one), extent(other)
    if low >= other_high or other_low >= high or low == high or other_low == other_high:
        return False
    try:
        return bool(np.shares_memory(_shadow(one), _shadow(other), max_work=100_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


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


def check_variable(name: str, array: Array) -> None:
    """Refuse what cannot be trained in place or could be read wrongly; errors name the variable."""
    if not is_array(array):
        hint = ": pass `np.asarray(value)`" if isinstance(array, (int, float, list)) else ""
        raise TypeError(f"variable {name!r} is {array!r} of type {type(array).__name__}; expected an array{hint}")
    kind = library(array)
    if kind == "cuda":
        gpu_arrays.require(f"variable {name!r}", array)
        if gpu_arrays.is_read_only(array):
            raise ValueError(f"variable {name!r} is read-only; expected an array that can be written")
    if kind == "numpy":
        _check_ndarray(f"variable {name!r}", array)
        if isinstance(array, np.generic):
            raise TypeError(
                f"variable {name!r} is the NumPy scalar {array!r}, which cannot be updated in place; "
                "expected an array, for example `np.asarray(value)`"
            )
        if not array.flags.writeable:
            raise ValueError(f"variable {name!r} is read-only; expected an array whose `flags.writeable` is True")
        if not array.flags.aligned:
            raise ValueError(f"variable {name!r} is not aligned in memory; expected an aligned array: pass a copy")
    elif array_api_compat.is_torch_array(array):
        check_tensor(f"variable {name!r}", array)
        if array.requires_grad and not array.is_leaf:
            raise ValueError(f"variable {name!r} is not a leaf of the autograd graph; expected a leaf tensor")
        if array.is_conj() or array.is_neg():
            raise ValueError(f"variable {name!r} is a lazy conjugate or negative; pass `resolve_conj().resolve_neg()`")
    _check_dtype(f"variable {name!r}", array)
    if kind == "cuda" and not _is_aligned(array):
        raise ValueError(f"variable {name!r} is not aligned in memory; expected an aligned array: pass a copy")
    if kind != "array_api" and _overlaps_itself(layout_of(array)):
        raise ValueError(
            f"variable {name!r} holds several elements at one address (shape {tuple(array.shape)}, strides "
            f"{layout_of(array).strides} bytes); expected an array that is not broadcast: pass a copy"
        )


def check_gradient(name: str, gradient: Array, variable: Array) -> None:
    """Refuse a gradient that does not belong to its variable; errors name the variable."""
    what = f"the gradient of {name!r}"
    if gradient is variable:
        raise ValueError(f"{what} is the variable itself and so shares memory with it; expected its gradient")
    if not is_array(gradient):
        hint = ": pass `np.asarray(value)`" if isinstance(gradient, (int, float, list)) else ""
        raise TypeError(f"{what} is {gradient!r} of type {type(gradient).__name__}; expected an array or None{hint}")
    if library(gradient) != library(variable) or library_name(gradient) != library_name(variable):
        raise TypeError(
            f"{what} is an array of {library_name(gradient)} on {device(gradient)}; expected one of "
            f"{library_name(variable)} on {device(variable)}, like its variable"
        )
    if isinstance(gradient, np.ndarray):
        _check_ndarray(what, gradient)
    elif array_api_compat.is_torch_array(gradient):
        check_tensor(what, gradient)
    if tuple(gradient.shape) != tuple(variable.shape):
        raise ValueError(f"{what} has shape {tuple(gradient.shape)}; expected {tuple(variable.shape)}, its variable's")
    _check_dtype(what, gradient)
    if is_complex(gradient) and not is_complex(variable):
        raise TypeError(f"{what} has dtype {dtype_name(gradient)}; expected a real one for {dtype_name(variable)}")
    if device(gradient) != device(variable):
        raise TypeError(f"{what} is on device {device(gradient)}; expected {device(variable)}, its variable's")


def is_complex(array: Array) -> bool:
    """Whether an array's dtype is complex."""
    return dtype_name(array).startswith("complex")


def read_directly(gradient: Array, variable: Array) -> bool:
    """Whether the kernels of a host variable read this gradient where it lies; others are cast into a scratch copy."""
    if isinstance(gradient, np.ndarray):
        plain = bool(gradient.flags.aligned)
    elif array_api_compat.is_torch_array(gradient):
        plain = not gradient.is_conj() and not gradient.is_neg()
    else:
        plain = not isinstance(gradient, np.generic) and _is_aligned(gradient)
    return plain and dtype_name(gradient) in (dtype_name(variable), SLOT[dtype_name(variable)])


def zeros_like(array: Array, dtype: str) -> Array:
    """Zeros of an array's library, shape, memory order and device, in another dtype."""
    if isinstance(array, np.ndarray):
        return np.zeros_like(array, dtype=dtype, order="K", subok=False)
    if library(array) == "cuda":
        return gpu_arrays.zeros_like(array, dtype)
    xp = namespace(array)
    if array_api_compat.is_torch_array(array):
        return xp.zeros_like(array.detach(), dtype=getattr(xp, dtype))
    return xp.zeros(array.shape, dtype=getattr(xp, dtype), device=array_api_compat.device(array))


def write(array: Array, value: Array) -> None:
    """Assign every element of a mutable array; torch is told of the change.

    Raises
    ------
    TypeError
        If the array is immutable.
    ValueError
        If the shapes differ.
    """
    if not is_mutable(array):
        raise TypeError(f"arrays of {library_name(array)} are immutable; use `stateless_apply` and its return values")
    value = value if is_array(value) else np.asarray(value)
    if tuple(value.shape) != tuple(array.shape):
        raise ValueError(f"value has shape {tuple(value.shape)}; expected {tuple(array.shape)}")
    if library_name(value) != library_name(array):
        value = to_numpy(value)
    if array_api_compat.is_torch_array(array):
        array.detach().copy_(value.detach() if library_name(value) == "torch" else namespace(array).asarray(value))
        if has_version(array):
            note_writes([array])
    elif array_api_compat.is_numpy_array(array):
        array[...] = value
    elif library(array) == "cuda" and gpu_arrays.is_foreign(array):
        gpu_arrays.write(array, to_numpy(value))
    elif array_api_compat.is_cupy_array(array):
        with array.device:
            array[...] = namespace(array).asarray(value)
    else:
        xp = namespace(array)
        array[...] = xp.astype(xp.asarray(value, device=array_api_compat.device(array)), array.dtype)


def write_all(writes: Sequence[tuple[Array, Array]]) -> None:
    """Write several arrays, all or none: what comes in between, an interrupt say, is kept until all are written."""
    for array, _ in writes:
        if not is_mutable(array) or not getattr(getattr(array, "flags", None), "writeable", True):
            raise ValueError(f"an array of shape {tuple(array.shape)} is read-only; expected one that can be written")
    try:
        for array, value in writes:
            write(array, value)
    except BaseException:
        for array, value in writes:
            write(array, value)
        raise


def like(array: Array, value: Array) -> Array:
    """A copy of a value as an array of the library, dtype, layout and device of another array."""
    if not is_mutable(array):
        xp = namespace(array)
        return xp.astype(xp.asarray(value if namespace(value) is xp else to_numpy(value)), array.dtype)
    result = zeros_like(array, dtype_name(array))
    write(result, value)
    return result


def cast(scratch: Array, value: Array) -> None:
    """Fill a scratch array with a value of another dtype or layout; what is too large becomes infinite."""
    if isinstance(scratch, np.ndarray):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(scratch, value, casting="unsafe")
    elif array_api_compat.is_torch_array(scratch):
        scratch.copy_(value.detach())
    elif array_api_compat.is_cupy_array(scratch):
        with scratch.device:
            scratch[...] = value
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            gpu_arrays.write(scratch, gpu_arrays.to_numpy(value))


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy copy of an array of any library; torch's bfloat16 becomes float32, which holds it exactly."""
    if library(array) == "cuda":
        return gpu_arrays.to_numpy(array)
    if array_api_compat.is_torch_array(array):
        array = array.detach().cpu()
        array = array.float() if dtype_name(array) == "bfloat16" else array
        return np.array(array.resolve_conj().resolve_neg().numpy())
    if hasattr(array, "get") and not isinstance(array, np.ndarray):
        array = array.get()
    return np.array(array)


def bits(array: Array) -> Array:
    """The array itself; of a mutable one of bfloat16 its bits, as uint16 over the same memory."""
    if dtype_name(array) != "bfloat16":
        return array
    if array_api_compat.is_torch_array(array):
        return array.detach().view(sys.modules["torch"].uint16)
    return (array if isinstance(array, np.ndarray) else to_numpy(array)).view(np.uint16)


def as_numpy(array: Array) -> np.ndarray[Any, Any]:
    """An array as NumPy, where it lies if it is on the host, else a copy; bfloat16 as its bits in uint16."""
    array = bits(array)
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        host: np.ndarray[Any, Any] = array.detach().resolve_conj().resolve_neg().numpy()
        return host
    return array if isinstance(array, np.ndarray) else to_numpy(array)


def note_writes(tensors: Sequence[Array]) -> None:
    """Tell torch's autograd that tensors are about to change in place, so that stale graphs are still noticed."""
    if tensors:
        sys.modules["torch"].autograd.graph.increment_version(tensors)


def has_version(array: Array) -> bool:
    """Whether torch counts the versions of a tensor (not of one made in inference mode)."""
    return array_api_compat.is_torch_array(array) and not array.is_inference()


def _check_ndarray(what: str, array: Array) -> None:
    if isinstance(array, np.ndarray) and type(array) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}; expected a plain numpy.ndarray (or "
            "numpy.memmap): pass `numpy.asarray(array)`, having dealt with what the subclass adds"
        )


def check_tensor(what: str, array: Array) -> None:
    """Refuse a tensor whose elements are not, all of them, at one place in memory."""
    tensor = sys.modules["torch"].Tensor
    if type(array).__torch_dispatch__ is not tensor.__torch_dispatch__:
        raise TypeError(f"{what} is a {type(array).__name__}, which keeps its elements elsewhere; expected a tensor")
    if str(array.layout) != "torch.strided":
        raise TypeError(f"{what} has layout {array.layout}; expected a dense tensor: pass `to_dense()`")
    if array.device.type == "meta":
        raise TypeError(f"{what} is on device meta, where nothing is stored; expected a tensor with data")
    _check_dtype(what, array)
    try:
        held = array.untyped_storage().nbytes() - array.storage_offset() * array.element_size()
        low, high = extent(layout_of(array)._replace(address=0)) if array.device.type in ("cpu", "cuda") else (0, 0)
        whole = low >= 0 and high <= held and (high == 0 or array.data_ptr() != 0)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise TypeError(f"{what} is a tensor whose elements are not at one place in memory ({error})") from None
    if not whole:
        raise ValueError(
            f"{what} has shape {tuple(array.shape)}, but its storage holds {held} bytes; expected all of it"
        )


def _is_aligned(array: Array) -> bool:
    layout = layout_of(array)
    return layout.address % min(ITEMSIZE.get(layout.dtype, 1), 8) == 0


def _check_dtype(what: str, array: Array) -> None:
    name = dtype_name(array)
    if name not in COMPUTE:
        raise TypeError(f"{what} has dtype {name}; expected one of {', '.join(COMPUTE)}: cast it first")
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise TypeError(f"{what} has byte order {array.dtype.str!r}; expected the machine's own byte order")


def _overlaps_itself(layout: Layout) -> bool:
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
