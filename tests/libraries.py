"""The array libraries that tests run on: how to make an array of each, and how to look at one."""

import array_api_strict
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

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
    return torch.tensor(np.array(array)).to(getattr(torch, dtype))


def parameter(array, dtype):
    return torch.nn.Parameter(to_torch(array, dtype))


def transposed(array, dtype):
    """A tensor whose memory runs through its axes backwards."""
    tensor = to_torch(array, dtype)
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def strict(array, dtype):
    return array_api_strict.asarray(np.array(array).astype(dtype))


def to_jax(array, dtype):
    return jnp.asarray(np.array(array).astype(DTYPES.get(dtype, dtype)))


IN_PLACE = [numpy, fortran, strided, to_torch, parameter, transposed, strict]
KERNELS = [numpy, fortran, strided, to_torch, parameter, transposed]


def look(array):
    """A NumPy copy, in float32 where NumPy lacks the dtype."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy().copy()
    return np.array(array, copy=True)
