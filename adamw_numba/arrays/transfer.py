"""Making, copying and writing arrays, each by its own library."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import array_api_compat
import numpy as np

from . import gpu
from .foreign import seen
from .layout import address, is_c_contiguous
from .library import ITEMSIZE, Array, dtype_name, family, has_version, is_array, is_mutable, library_name, namespace

PAGE, LINE, APART = 4096, 64, 512  # bytes: of a page, and of a line of cache; and how far apart arrays are put
LARGE = 1 << 18  # bytes from which on an array's place matters


def zeros_like(array: Array, dtype: str) -> Array:
    """Zeros of an array's library, shape, memory order and device, in another dtype."""
    if isinstance(array, np.ndarray):
        if array.flags.c_contiguous:  # a sixth of the time of `zeros_like`, which is written in Python
            return np.zeros(array.shape, dtype)
        return np.zeros_like(array, dtype=dtype, order="K", subok=False)
    array = seen(array)
    if isinstance(array, np.ndarray):
        return zeros_like(array, dtype)
    if array_api_compat.is_torch_array(array):
        torch = sys.modules["torch"]
        return torch.zeros_like(array, dtype=getattr(torch, dtype))
    if family(array) == "cuda":
        return gpu.zeros_like(array, dtype)
    xp = namespace(array)
    if array_api_compat.is_jax_array(array):  # committed to its devices only where the array is, and divided like it
        return xp.zeros_like(array, dtype=dtype)
    if array_api_compat.is_dask_array(array):  # one chunk, unless told otherwise
        return xp.zeros(array.shape, dtype=getattr(xp, dtype), chunks=array.chunks)
    return xp.zeros(array.shape, dtype=getattr(xp, dtype), device=array_api_compat.device(array))


def zeros_beside(array: Array, dtype: str, number: int) -> Array:
    """The same, for one of several arrays that a loop walks together with this one.

    Allocators put large arrays at the same place within a page, and addresses that are equal up to a page get into each
    other's way in the first cache: a loop over 16-bit moments takes a third longer. So each of these has a place of its
    own, by its number, counted from 1.
    """
    array = seen(array)
    is_tensor = array_api_compat.is_torch_array(array)
    if not (isinstance(array, np.ndarray) or (is_tensor and array.device.type == "cpu")):
        return zeros_like(array, dtype)
    itemsize, count = ITEMSIZE[dtype], math.prod(array.shape)
    if count * itemsize < LARGE or not is_c_contiguous(array):
        return zeros_like(array, dtype)
    if is_tensor:
        torch = sys.modules["torch"]
        room = torch.zeros(count + PAGE // itemsize, dtype=getattr(torch, dtype), device=array.device)
    else:
        room = np.zeros(count + PAGE // itemsize, dtype)
    place = address(array) // LINE * LINE + number * APART
    start = (place - address(room)) % PAGE // itemsize
    return room[start : start + count].reshape(array.shape)


def zeros_of(array: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros of an array's library and device; over several devices divided as its first axis is, if that can be."""
    array = seen(array)
    if isinstance(array, np.ndarray):
        return np.zeros(shape, dtype)
    if family(array) == "cuda" and gpu.is_foreign(array):
        return gpu.zeros_of_numba(array, shape, dtype)
    xp = namespace(array)
    if array_api_compat.is_jax_array(array):
        return on_all_devices(xp.zeros(shape, dtype=getattr(xp, dtype)), [array], along=True)
    extra = {} if array_api_compat.is_dask_array(array) else {"device": array_api_compat.device(array)}
    return xp.zeros(shape, dtype=getattr(xp, dtype), **extra)


def on_all_devices(array: Array, others: Sequence[Array], along: bool = False) -> Array:
    """An array of JAX on all devices of others, if somebody has put those there, where they have to stay.

    It is whole on each of them or, with `along`, divided as the first axis of the others is.
    """
    jax = sys.modules["jax"]
    placed = [each.sharding for each in others if not isinstance(each, jax.core.Tracer) and each.committed]
    if not placed:
        return array
    mesh = getattr(placed[0], "mesh", None)
    if mesh is None:
        return jax.device_put(array, placed[0])
    first = (placed[0].spec or [None])[0] if along else None
    axes = first if isinstance(first, tuple) else (first,)
    parts = [first] if first and array.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else []
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts)))


def like(array: Array, value: Array) -> Array:
    """A copy of a value as an array of the library, dtype, layout and device of another array."""
    array = seen(array)
    if not is_mutable(array):
        xp = namespace(array)
        value = xp.asarray(value if namespace(value) is xp else to_numpy(value), copy=True)  # it may be donated
        made = xp.astype(value, array.dtype)
        return made.rechunk(array.chunks) if array_api_compat.is_dask_array(array) else made
    result = zeros_like(array, dtype_name(array))
    write(result, value)
    return result


def copied(array: Array) -> Array:
    """A copy of an array that nobody else holds; of an immutable one, too, which JAX can be told to delete."""
    if type(array) is np.ndarray:
        return array.copy()
    if array_api_compat.is_torch_array(array):
        return (array.detach() if array.requires_grad else array).clone()
    return like(array, array)


def write(array: Array, value: Array) -> None:
    """Assign every element of a mutable array; torch is told of the change.

    Raises
    ------
    TypeError
        If the array is immutable.
    ValueError
        If the shapes differ.
    """
    if type(array) is type(value) is np.ndarray and array.shape == value.shape:  # most, and ten times as fast
        array[...] = value
        return
    given, array = array, seen(array)
    if not is_mutable(array):
        raise TypeError(f"arrays of {library_name(array)} are immutable; use `stateless_apply` and its return values")
    value = seen(value) if is_array(value) else np.asarray(value)
    if tuple(value.shape) != tuple(array.shape):
        raise ValueError(f"value has shape {tuple(value.shape)}; expected {tuple(array.shape)}")
    if library_name(value) != library_name(array):
        value = to_numpy(value)
    if array_api_compat.is_torch_array(array):
        array.detach().copy_(value.detach() if library_name(value) == "torch" else namespace(array).asarray(value))
        if has_version(array):
            note_writes([array] if given is array else [array, given])
    elif array_api_compat.is_numpy_array(array):
        array[...] = value
    elif family(array) == "cuda" and gpu.is_foreign(array):
        gpu.write(array, to_numpy(value))
    elif array_api_compat.is_cupy_array(array):
        with array.device:
            array[...] = namespace(array).asarray(value)
    else:
        xp = namespace(array)
        array[...] = xp.astype(xp.asarray(value, device=array_api_compat.device(array)), array.dtype)


def write_all(writes: Sequence[tuple[Array, Array]]) -> None:
    """Write several arrays, all or none: an interrupt that comes in between is raised when all are written."""
    check_writeable(array for array, _ in writes)
    try:
        for array, value in writes:
            write(array, value)
    except BaseException:
        for array, value in writes:  # again from the first one: any of them may have been written in part
            write(array, value)
        raise


def check_writeable(targets: Iterable[Array]) -> None:
    """Refuse arrays that cannot be written into."""
    for array in targets:
        if not is_mutable(array) or not getattr(getattr(array, "flags", None), "writeable", True):
            raise ValueError(f"an array of shape {tuple(array.shape)} is read-only; expected one that can be written")


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
            gpu.write(scratch, gpu.to_numpy(value))


def writeable_copy(array: Array) -> Array:
    """The array itself, or a copy of a read-only NumPy array."""
    read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    return like(array.copy(), array) if read_only else array


def detached(array: Array) -> Array:
    """The array itself; of a tensor the same memory outside of autograd's graph."""
    return array.detach() if array_api_compat.is_torch_array(array) else array


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy copy of an array of any library; torch's bfloat16 becomes float32, which holds it exactly."""
    array = seen(array)
    if family(array) == "cuda":
        return gpu.to_numpy(array)
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
    return (array if isinstance(array, np.ndarray) or gpu.is_numba(array) else to_numpy(array)).view(np.uint16)


def as_numpy(array: Array) -> np.ndarray[Any, Any]:
    """An array as NumPy, where it lies if it is on the host, else a copy; bfloat16 as its bits in uint16."""
    array = bits(array)
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        host: np.ndarray[Any, Any] = array.detach().resolve_conj().resolve_neg().numpy()
        return host
    return array if isinstance(array, np.ndarray) else to_numpy(array)


def note_writes(tensors: Sequence[Array]) -> None:
    """Tell torch's autograd that tensors are about to change in place.

    It counts the versions of each tensor and refuses to run backward through one that has changed since the forward
    pass. Compiled code writes behind its back, and without this the gradients would be silently wrong.
    """
    if tensors:
        sys.modules["torch"].autograd.graph.increment_version(tensors)
