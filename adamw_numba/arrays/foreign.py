"""Arrays of libraries without a namespace: each is seen as an array that this package knows, over the same memory.

On the host these are objects with NumPy's array interface (NVIDIA Warp's arrays, ROOT's vectors) or with DLPack alone
(nanobind's arrays), and what is seen of them is a NumPy array: it is made when the optimizer is built, and again
where the object has moved. On a GPU they are those that say shape and dtype in words of their own, as Warp's do (the
others are left to gpu.py). Of a DTensor, it is the local tensor. Everything else, from the checks to the kernels, only
meets what is seen.
"""

from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from . import dtensors, gpu
from .brief import brief

Array = Any
_ON_HOST = {1, 3, 11}  # DLPack's numbers of devices whose memory the processor reads: CPU, pinned for CUDA or ROCm
_KNOWN = (np.ndarray, np.generic)
_BY_INTERFACE: set[type] = set()  # foreign types met so far, for which array_api_compat need not be asked again


class _Lent:
    """What NumPy makes a view of: an array interface, and all that has to live as long as the view."""

    def __init__(self, interface: dict[str, Any], owner: Array, held: Any = None) -> None:
        self.__array_interface__, self.owner, self.held = interface, owner, held


def is_foreign(value: object) -> bool:
    """Whether a value lies on the host and only tells where, by an array interface or DLPack."""
    if isinstance(value, _KNOWN) or array_api_compat.is_array_api_obj(value):
        return False
    return _has_interface(value) or gpu.dlpack_device(value)[0] in _ON_HOST


def seen(array: Array, what: str = "the array", name: str | None = None) -> Array:
    """An array that this package knows, over the memory of one of any library; where it is known itself, the same.

    Parameters
    ----------
    array : array
        Anything else is returned as it is.
    what, name : str
        What errors call the array.

    Raises
    ------
    TypeError
        If NumPy cannot see its memory.
    ImportError
        If it holds bfloat16, of which NumPy only knows through `ml_dtypes`, and that is missing.
    """
    if isinstance(array, _KNOWN):
        return array
    if type(array) in _BY_INTERFACE and _has_interface(array):
        return _view(array, what, name)
    if dtensors.is_dtensor(array):
        return dtensors.local(array)
    if array_api_compat.is_array_api_obj(array):
        return array
    if gpu.is_cuda_array(array):
        return gpu.seen(array)
    if not is_foreign(array):
        return array
    if _has_interface(array):
        _BY_INTERFACE.add(type(array))
    return _view(array, what, name)


def seen_all(names: Sequence[str], variables: list[Array]) -> list[Array]:
    """What is seen of each variable: the same list, if all are known themselves."""
    found = [seen(variable, "variable", name) for name, variable in zip(names, variables, strict=True)]
    found = [each.detach() if dtensors.is_local(each) else each for each in found]
    return variables if all(one is other for one, other in zip(found, variables, strict=True)) else found


def seen_again(name: str, array: Array, before: Array) -> Array:
    """What is seen of a variable now: the same object as before, if nothing but values has changed."""
    if dtensors.is_dtensor(array):
        return dtensors.local(array)
    if not isinstance(before, np.ndarray):  # on a GPU: it asks the array itself
        return before
    found = getattr(array, "__array_interface__", None)
    if found is not None and type(found.get("data")) is tuple and found == _lent(before).__array_interface__:
        return before
    now = _view(array, "variable", name)
    return before if _header(now) == _header(before) else now


def origin(array: Array) -> Array:
    """The array whose memory is seen; an array that is known itself is its own."""
    lent = _lent(array)
    return array if lent is None else lent.owner


def _has_interface(value: object) -> bool:
    # The type first: a property may raise AttributeError, as Warp's does for an array on a GPU.
    return hasattr(type(value), "__array_interface__") and hasattr(value, "__array_interface__")


def _view(array: Array, what: str, name: str | None) -> np.ndarray[Any, Any]:
    try:
        found = _by_interface(array) if _has_interface(array) else _by_dlpack(array)
    except Exception as error:  # whatever its library raises
        kind = _kind(array, what, name)
        raise TypeError(f"{kind} whose memory NumPy cannot see ({brief(error)}); expected an array") from error
    if found.dtype == np.uint16 and _word(getattr(array, "dtype", None)) == "bfloat16":
        return found.view(_bfloat16(array, what, name))
    return found


def _kind(array: Array, what: str, name: str | None) -> str:
    """How an error about an array begins."""
    called = what if name is None else f"{what} {brief(name)}"
    return f"{called} is a {type(array).__module__}.{type(array).__qualname__}"


def _by_interface(array: Array) -> np.ndarray[Any, Any]:
    interface = dict(array.__array_interface__)  # a copy: the library may change its own
    data = interface.get("data")
    if data is None:  # then the array itself is a buffer
        interface["data"] = array
    elif type(data) is tuple and not data[0] and 0 not in interface["shape"]:  # older NumPys take it for a scalar
        raise ValueError("it lies nowhere: its address is 0")
    return np.asarray(_Lent(interface, array))


def _by_dlpack(array: Array) -> np.ndarray[Any, Any]:
    held = np.from_dlpack(array)
    return np.asarray(_Lent(held.__array_interface__, array, held))


def _lent(array: Array) -> Any:
    """What a view was made of; None for any other array."""
    base = getattr(array, "base", None) if isinstance(array, np.ndarray) else None
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Lent) else None


def _header(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.__array_interface__["data"], array.shape, array.strides, array.dtype


def _word(dtype: Any) -> str:
    """What a library calls a dtype; Warp's are classes."""
    return dtype.__name__ if isinstance(dtype, type) else str(dtype).rpartition(".")[2]


def _bfloat16(array: Array, what: str, name: str | None) -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(
            f"{_kind(array, what, name)} of bfloat16, which NumPy needs ml_dtypes for: pip install 'adamw-numba[warp]'"
        ) from None
    return ml_dtypes.bfloat16
