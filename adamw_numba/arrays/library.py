"""What an array is: its library, its device and its dtype, in one word each.

No array library except for NumPy is imported here: one that has made an array is imported already.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any

import array_api_compat
import numpy as np

from . import gpu
from .foreign import is_foreign

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
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
ITEMSIZE |= {"uint8": 1, "uint16": 2, "uint32": 4, "int16": 2}  # of moments and masters of fewer bits: see there
_ARRAY_TYPES: set[type] = set()
_NAMES: dict[tuple[type, Any], str] = {}  # by dtype: NumPy puts the name together whenever it is asked


def is_array(value: object) -> bool:
    """Whether a value is an array of any library (a NumPy scalar is one of no dimensions)."""
    if type(value) in _ARRAY_TYPES:
        return True
    known = isinstance(value, (np.generic, np.ndarray)) or array_api_compat.is_array_api_obj(value)
    known = known or gpu.is_cuda_array(value) or is_foreign(value)
    known = known and not _is_container_of_jax(value)
    if known:
        _ARRAY_TYPES.add(type(value))
    return known


def _is_container_of_jax(value: object) -> bool:
    """Whether JAX has been told how to take it apart: flax's variables act as the array that they hold."""
    tree_util = getattr(sys.modules.get("jax"), "tree_util", None)
    return tree_util is not None and not tree_util.all_leaves([value])


def are_arrays(values: Iterable[object]) -> bool:
    """Whether the types of all values are known to be types of arrays: quick, and False for a type not met before."""
    return _ARRAY_TYPES.issuperset(map(type, values))


def family(array: Array) -> str:
    """``numpy``, ``torch`` (on the CPU) and ``cuda`` go to compiled kernels, ``array_api`` to whole-array functions.

    What is ``foreign`` goes nowhere: see `foreign.seen`.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return "numpy"
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        return "torch"
    if gpu.is_cuda_array(array):
        return "cuda"
    return "foreign" if is_foreign(array) else "array_api"


def place(array: Array) -> str | None:
    """Which plan an array belongs to: ``cpu``, ``cuda:0``, ...; None for an array without compiled kernels."""
    kind = family(array)
    if kind == "cuda":
        return f"cuda:{gpu.device_index(array)}"
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
    if family(array) == "cuda":
        return str(place(array))
    if is_foreign(array):
        return "cpu"
    return str(array_api_compat.device(array))


def dtype_name(array: Array) -> str:
    """The name of an array's dtype, the same for every library: ``float32``, ``bfloat16``, ..."""
    dtype = array.dtype
    key = type(dtype), dtype  # the dtypes of two libraries may have one hash, and warn when they are compared
    try:
        return _NAMES[key]
    except (KeyError, TypeError):  # not seen before, or not hashable
        name = getattr(dtype, "name", None)
        name = name if isinstance(name, str) else str(dtype).rpartition(".")[2]
        if name in COMPUTE:  # few; there is no end of structured dtypes
            _NAMES[key] = name
        return name


def has_dtype(array: Array, name: str) -> bool:
    """Whether the library of an array has a dtype of that name; on a GPU, unless it is torch, those of NumPy."""
    is_torch = array_api_compat.is_torch_array(array)
    return hasattr(np if gpu.is_cuda_array(array) and not is_torch else namespace(array), name)


def byte_count(array: Array) -> int:
    """The bytes of an array's elements."""
    name = dtype_name(array)
    return int((ITEMSIZE.get(name) or np.dtype(name).itemsize) * math.prod(array.shape))


def is_complex(array: Array) -> bool:
    """Whether an array's dtype is complex."""
    return dtype_name(array).startswith("complex")


def is_mutable(array: Array) -> bool:
    """Whether an array's elements can be assigned to; JAX's and Dask's cannot."""
    if family(array) in ("numpy", "cuda", "foreign"):
        return True
    return bool(array_api_compat.is_writeable_array(array)) and not array_api_compat.is_dask_array(array)


def has_version(array: Array) -> bool:
    """Whether torch counts the versions of a tensor (not of one made in inference mode)."""
    return array_api_compat.is_torch_array(array) and not array.is_inference()
