"""The array libraries that tests run on: how to make an array of each, and how to look at one.

torch, JAX, Keras, optax and array_api_strict are imported where they are first used, since the tests also run without
them: a test that uses one that is not installed is skipped. conftest.py says which may be missing.
"""

import array_api_compat
import ml_dtypes
import numpy as np
import pytest
from helpers import plain_library


class Library:
    """A module that is imported when one of its names is used."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        # pytest asks everything in a file for such names; if that imported the library, it would skip the whole file.
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return getattr(pytest.importorskip(self._name), name)


torch, jax, jnp, keras, optax, array_api_strict = map(
    Library, ("torch", "jax", "jax.numpy", "keras", "optax", "array_api_strict")
)
DTYPES = {"bfloat16": ml_dtypes.bfloat16}


def numpy(array, dtype):
    return np.array(array).astype(DTYPES.get(dtype, dtype))


def fortran(array, dtype):
    return np.array(numpy(array, dtype), order="F")


def strided(array, dtype):
    """Every other element of something larger, backwards along the first axis."""
    array = np.asarray(array)
    if array.ndim == 0:
        return numpy(array, dtype)
    large = np.zeros([2 * size for size in array.shape], DTYPES.get(dtype, dtype))
    view = large[tuple(slice(None, None, 2) for _ in array.shape)][::-1]
    view[...] = array
    return view


def to_torch(array, dtype):
    """Rounded by NumPy, to the values of the other libraries' arrays: torch rounds float64 to float16 by way of float32."""
    with np.errstate(over="ignore"):
        values = numpy(array, dtype)
    if dtype == "bfloat16":  # which torch cannot take from NumPy
        return torch.tensor(values.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(values)


def parameter(array, dtype):
    return torch.nn.Parameter(to_torch(array, dtype))


def transposed(array, dtype):
    """A tensor whose memory runs through its axes backwards."""
    tensor = to_torch(array, dtype)
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def strict(array, dtype):
    return array_api_strict.asarray(np.array(array).astype(dtype))


def plain(array, dtype):
    return plain_library.Plain(np.array(array).astype(dtype))


def to_jax(array, dtype):
    return jnp.asarray(np.array(array).astype(DTYPES.get(dtype, dtype)))


def on_gpu(array, dtype):
    """One of Numba's device arrays; in its simulator an array on the host that poses as one."""
    from numba import cuda

    return cuda.to_device(numpy(array, dtype))


def gpu_strided(array, dtype):
    """Every other element of something larger on the GPU."""
    array = np.asarray(array)
    large = np.zeros([2 * size for size in array.shape], DTYPES.get(dtype, dtype))
    large[tuple(slice(None, None, 2) for _ in array.shape)] = array
    device = on_gpu(large, dtype)
    return device[tuple(slice(None, None, 2) for _ in array.shape)] if array.ndim else device


def to_cupy(array, dtype):
    import cupy

    return cupy.asarray(numpy(array, dtype))


def cupy_fortran(array, dtype):
    import cupy

    return cupy.asarray(numpy(array, dtype), order="F")  # `asfortranarray` gives an array of no axes one


def torch_on_gpu(array, dtype):
    return to_torch(array, dtype).cuda()


def parameter_on_gpu(array, dtype):
    return torch.nn.Parameter(torch_on_gpu(array, dtype))


def transposed_on_gpu(array, dtype):
    return transposed(array, dtype).cuda()


IN_PLACE = [numpy, fortran, strided, to_torch, parameter, transposed, strict]
KERNELS = [numpy, fortran, strided, to_torch, parameter, transposed]


def look(array):
    """A NumPy copy, in float32 where NumPy lacks the dtype."""
    if hasattr(array, "copy_to_host"):
        return np.array(array.copy_to_host())
    if hasattr(array, "get"):
        return array.get()
    if array_api_compat.is_torch_array(array):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy().copy()
    return np.array(array, copy=True)
