"""Arrays on a GPU: which library made them, where they lie, and how they are made, copied and ordered in time.

These are CuPy arrays, torch tensors, Numba's own device arrays, and everything that has ``shape``, ``dtype`` and the
CUDA array interface or DLPack ("foreign" arrays). State is allocated by the array's own library; for foreign arrays by
Numba.

No module of this package may be called ``cuda...``: numba-cuda redirects every import whose dotted name contains
``numba.cuda``, which ``adamw_numba.cuda`` does.
"""

import importlib
import importlib.metadata
import importlib.util
import math
import sys
from operator import attrgetter
from typing import Any

import array_api_compat
import numpy as np

Array = Any
EXTRAS = "pip install 'adamw-numba[cuda13]' (or [cuda12], for a driver of CUDA 12)"
_DLPACK_CUDA = 2
_LEGACY_STREAM = 1  # its number in the CUDA array interface
_OF_NUMBA = attrgetter("shape", "strides", "dtype")


def is_cuda_array(array: Array) -> bool:
    """Whether an array lies on a GPU and may be updated there in place; JAX's are immutable."""
    if isinstance(array, (np.ndarray, np.generic)) or array_api_compat.is_jax_array(array):
        return False
    if array_api_compat.is_torch_array(array):
        return bool(array.device.type == "cuda")
    if is_numba(array) or array_api_compat.is_cupy_array(array):
        return True
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        return False
    return _has_interface(array) or dlpack_device(array)[0] == _DLPACK_CUDA


def _has_interface(array: Array) -> bool:
    # Warp's arrays have one type wherever they lie: on the host the attribute raises AttributeError.
    return hasattr(type(array), "__cuda_array_interface__") and hasattr(array, "__cuda_array_interface__")


def is_numba(array: Array) -> bool:
    """Whether an array is one of Numba's device arrays."""
    return bool(getattr(type(array), "__cuda_ndarray__", False))


def is_foreign(array: Array) -> bool:
    """Whether a GPU array's library has no Array-API namespace."""
    return not (array_api_compat.is_torch_array(array) or array_api_compat.is_cupy_array(array))


class _Seen:
    """A GPU array that says shape and dtype in words of its own, in those of NumPy: Warp's vectors are an axis there.

    Its interface is of version 3, which tells the stream as well: the one that Warp works in at that moment. What has
    none is taken to be in order with the legacy default stream, as version 2 has it.
    """

    def __init__(self, owner: Array) -> None:
        self.owner = owner
        interface = owner.__cuda_array_interface__
        self.shape, self.dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = self.owner.__cuda_array_interface__
        if interface["version"] >= 3:
            return dict(interface)
        stream = getattr(getattr(getattr(self.owner, "device", None), "stream", None), "cuda_stream", None)
        return {**interface, "version": 3, "stream": stream or _LEGACY_STREAM}

    def __dlpack_device__(self) -> tuple[int, int]:  # where it lies; without `__dlpack__` nothing more is asked
        return dlpack_device(self.owner)


def seen(array: Array) -> Array:
    """A GPU array as its interface has it, where its own dtype is not NumPy's; else the array itself."""
    if not is_foreign(array) or is_numba(array) or not _has_interface(array) or _is_of_numpy(array.dtype):
        return array
    return _Seen(array)


def _is_of_numpy(dtype: object) -> bool:
    return isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic))


def require(name: str, array: Array) -> None:
    """Refuse a GPU array that cannot be used here, and say what to install.

    Raises
    ------
    ImportError
        If numba-cuda is missing or cannot be imported, or if its compiler is not found.
    RuntimeError
        If there is no usable driver or GPU.
    """
    what = f"{name} is a {type(array).__module__}.{type(array).__qualname__} on a GPU"
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(f"{what}, which needs numba-cuda: {EXTRAS}")
    cuda = _imported(what)
    if missing := _missing_compiler():
        raise ImportError(f"{what}, but numba-cuda does not find its compiler, libNVVM ({missing}): {EXTRAS}")
    if not cuda.is_available():
        error = _first_line(cuda.cuda_error() or "cuda.is_available() is False")
        raise RuntimeError(f"{what}, but Numba finds no usable GPU here ({error}); expected a driver and {EXTRAS}")


def _imported(what: str) -> Any:
    """The module `numba.cuda`; an error names the versions that do not go together."""
    try:
        from numba import cuda

        if not _is_simulated():
            importlib.import_module("numba.cuda.np.arrayobj")  # depends on NumPy; Numba imports it when it compiles
    except Exception as error:  # an AttributeError, for example, where NumPy has dropped a function
        packages = "numba-cuda", "numba", "numpy"
        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ImportError(
            f"{what}, but numba-cuda cannot be imported here ({versions}; {reason}); "
            f"expected versions that go together: {EXTRAS}"
        ) from error
    return cuda


def _missing_compiler() -> str:
    """Why the first kernel could not be compiled: libNVVM or what it needs is not found. Empty if nothing is missing.

    Numba searches in the same way, but only when it compiles, and its errors do not say what to install.
    """
    if _is_simulated():
        return ""
    paths: Any = importlib.import_module("numba.cuda.cuda_paths")
    try:
        found = paths.get_cuda_paths()  # raises if libNVVM or NVRTC is missing; Numba keeps what was found
    except RuntimeError as error:
        return _first_line(error)
    return "" if found["libdevice"].info else "libdevice is missing"


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0]


def device_index(array: Array) -> int:
    """The number of the GPU an array lies on."""
    if array_api_compat.is_torch_array(array):
        return int(array.device.index or 0)
    if array_api_compat.is_cupy_array(array):
        return int(array.device.id)
    if is_numba(array):
        context = getattr(getattr(array, "gpu_data", None), "context", None)
        return int(context.device.id) if context is not None else 0
    kind, index = dlpack_device(array)
    if kind == _DLPACK_CUDA:
        return index
    try:
        return int(_view(array).device_id)
    except (ImportError, RuntimeError, BufferError):  # there is no driver; `require` says so
        return 0


def layout(array: Array) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    """Address, shape, strides in bytes, and the name of the dtype."""
    if array_api_compat.is_torch_array(array):
        size = array.element_size()
        strides = tuple(stride * size for stride in array.stride())
        return array.data_ptr(), tuple(array.shape), strides, str(array.dtype).rpartition(".")[2]
    if array_api_compat.is_cupy_array(array):
        return array.data.ptr, array.shape, array.strides, array.dtype.name
    if is_numba(array):
        return address(array), tuple(array.shape), tuple(array.strides), np.dtype(array.dtype).name
    view = _view(array)
    dtype = np.dtype(view.dtype)
    counts = view.strides if view.strides is not None else _contiguous(view.shape)
    return view.ptr, tuple(view.shape), tuple(count * dtype.itemsize for count in counts), dtype.name


def signature(array: Array) -> object:
    """Everything that decides whether an array is accepted, except for its address; None if it cannot be read."""
    if is_numba(array):
        return type(array), *_OF_NUMBA(array), device_index(array)
    try:
        return type(array), *layout(array)[1:], device_index(array)
    except (ImportError, RuntimeError, BufferError):
        return None


def address(array: Array) -> int:
    """Where one of Numba's device arrays lies; in the simulator, where its array on the host does."""
    if _is_simulated():
        host: int = array._ary.ctypes.data
        return host
    return int(array.device_ctypes_pointer.value or 0)


def is_read_only(array: Array) -> bool:
    """Whether a GPU array says that it must not be written."""
    return is_foreign(array) and not is_numba(array) and bool(_view(array).readonly)


def zeros_like(array: Array, dtype: str) -> Array:
    """Zeros of an array's library, shape, memory order and device; of Numba for what has no namespace."""
    if array_api_compat.is_torch_array(array):
        torch = sys.modules["torch"]
        return torch.zeros_like(array.detach(), dtype=getattr(torch, dtype))
    if array_api_compat.is_cupy_array(array):
        cupy = sys.modules["cupy"]
        with array.device:
            return cupy.zeros_like(array, dtype=dtype)
    _, shape, strides, name = layout(array)
    order = "F" if strides == _contiguous(shape[::-1], np.dtype(name).itemsize)[::-1] else "C"
    return zeros_of_numba(array, shape, dtype, order)


def zeros_of_numba(array: Array, shape: tuple[int, ...], dtype: str, order: str = "C") -> Array:
    """Zeros of Numba, where an array lies."""
    from numba import cuda

    with cuda.gpus[device_index(array)]:
        return cuda.to_device(np.zeros(shape, dtype, order=order))  # type: ignore[call-overload]


def write(array: Array, value: np.ndarray[Any, Any]) -> None:
    """Assign a NumPy array to an array without a namespace."""
    _wait(array)
    target = array if is_numba(array) else _numba_view(array)
    value = value.astype(target.dtype, copy=False)
    if target.ndim == 0 or target.flags["C_CONTIGUOUS"] or target.flags["F_CONTIGUOUS"]:
        order = "C" if target.ndim == 0 or target.flags["C_CONTIGUOUS"] else "F"
        target.copy_to_device(np.array(value, order=order))  # type: ignore[call-overload]
    else:
        target[...] = value
    _wait(array)


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A copy on the host; of torch's bfloat16 as float32.

    It is made through pinned memory, to which a GPU copies several times as fast.
    """
    if array_api_compat.is_torch_array(array):
        torch = sys.modules["torch"]
        array = array.detach().resolve_conj().resolve_neg()
        pinned = torch.empty(array.shape, dtype=array.dtype, device="cpu", pin_memory=True).copy_(array)
        return np.array((pinned.float() if array.dtype == torch.bfloat16 else pinned).numpy())
    if array_api_compat.is_cupy_array(array):
        import cupyx

        with array.device:
            return np.array(array.get(out=cupyx.empty_pinned(array.shape, array.dtype), order="C"))
    from numba import cuda

    _wait(array)
    source = array if is_numba(array) else _numba_view(array)
    contiguous = source.ndim == 0 or source.flags["C_CONTIGUOUS"] or source.flags["F_CONTIGUOUS"]
    if source.size == 0 or not contiguous:
        return np.array(source.copy_to_host())
    order = "C" if source.ndim == 0 or source.flags["C_CONTIGUOUS"] else "F"
    host = cuda.pinned_array(source.shape, source.dtype, order=order)
    stream = cuda.legacy_default_stream()
    source.copy_to_host(host, stream)
    stream.synchronize()
    return np.array(host)


def current_stream(array: Array, device: int, consumer: int = 0) -> tuple[int, Any]:
    """The handle of the stream in which an array's library, or the array, works now, and what keeps it alive.

    An array that has nothing but DLPack does not tell its stream. There the library is asked to make the stream
    `consumer` wait, and 0 is returned.
    """
    if array_api_compat.is_torch_array(array):
        stream = sys.modules["torch"].cuda.current_stream(device)
        return int(stream.cuda_stream), stream
    if array_api_compat.is_cupy_array(array):
        stream = sys.modules["cupy"].cuda.get_current_stream(device)
        return int(stream.ptr), stream
    if is_numba(array):
        stream = array.stream
        return numba_stream(array), stream or None
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        _view(array, consumer or 1)
    handle = (interface or {}).get("stream") or 0
    return (0 if handle == 1 else int(handle)), None  # 1 also means the legacy default stream


def numba_stream(array: Array) -> int:
    """The handle of the stream that one of Numba's arrays was made for."""
    stream = getattr(array, "stream", 0)
    handle = int(stream) if stream else 0
    return 0 if handle == 1 else handle  # two names of the legacy default stream


def _wait(array: Array) -> None:
    """Wait for a GPU: before and after copies that are not ordered by a stream."""
    from numba import cuda as compiler

    cuda: Any = compiler
    with cuda.gpus[device_index(array)]:
        cuda.synchronize()


def _is_simulated() -> bool:
    from numba import config

    return bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]


def _contiguous(shape: tuple[int, ...], size: int = 1) -> tuple[int, ...]:
    """Strides in C order."""
    return tuple(size * math.prod(shape[k + 1 :]) for k in range(len(shape)))


def dlpack_device(array: Array) -> tuple[int, int]:
    """DLPack's numbers for where an array lies; (0, 0) if it has no DLPack."""
    try:
        kind, index = array.__dlpack_device__()
        return int(kind), int(index)
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        return 0, 0


def _view(array: Array, stream: int = -1) -> Any:
    """What an array's CUDA array interface or DLPack says; a stream of -1 means that none has to wait for it."""
    from cuda.core.utils import StridedMemoryView

    return StridedMemoryView.from_any_interface(array, stream_ptr=stream)


def _numba_view(array: Array) -> Any:
    """One of Numba's device arrays over the memory of another library's."""
    from numba import cuda

    where, shape, strides, dtype = layout(array)
    interface = {
        "data": (where, False),
        "shape": shape,
        "strides": strides,
        "typestr": np.dtype(dtype).str,
        "version": 3,
    }
    return cuda.from_cuda_array_interface(interface, owner=array, sync=False)
