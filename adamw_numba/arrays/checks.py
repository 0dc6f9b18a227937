"""Every check on an array that a user hands over; errors name the variable."""

import sys

import array_api_compat
import numpy as np

from . import gpu
from .layout import extent, is_aligned, layout_of, overlaps_itself
from .library import COMPUTE, SLOT, Array, device, dtype_name, family, is_array, is_complex, library_name


def check_variable(name: str, array: Array) -> None:
    """Refuse what cannot be trained in place or could be read wrongly; errors name the variable."""
    if not is_array(array):
        hint = ": pass `np.asarray(value)`" if isinstance(array, (int, float, list)) else ""
        raise TypeError(f"variable {name!r} is {array!r} of type {type(array).__name__}; expected an array{hint}")
    kind = family(array)
    if kind == "cuda":
        gpu.require(f"variable {name!r}", array)
        if gpu.is_read_only(array):
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
    if kind == "cuda" and not is_aligned(array):
        raise ValueError(f"variable {name!r} is not aligned in memory; expected an aligned array: pass a copy")
    if kind != "array_api" and overlaps_itself(layout_of(array)):
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
    if family(gradient) != family(variable) or library_name(gradient) != library_name(variable):
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


def read_directly(gradient: Array, variable: Array) -> bool:
    """Whether the kernels of a host variable read this gradient where it lies; others are cast into a scratch copy."""
    if isinstance(gradient, np.ndarray):
        plain = bool(gradient.flags.aligned)
    elif array_api_compat.is_torch_array(gradient):
        plain = not gradient.is_conj() and not gradient.is_neg()
    else:
        plain = not isinstance(gradient, np.generic) and is_aligned(gradient)
    return plain and dtype_name(gradient) in (dtype_name(variable), SLOT[dtype_name(variable)])


def _check_ndarray(what: str, array: Array) -> None:
    if isinstance(array, np.ndarray) and type(array) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}; expected a plain numpy.ndarray (or "
            "numpy.memmap): pass `numpy.asarray(array)`, having dealt with what the subclass adds"
        )


def _check_dtype(what: str, array: Array) -> None:
    name = dtype_name(array)
    if name not in COMPUTE:
        raise TypeError(f"{what} has dtype {name}; expected one of {', '.join(COMPUTE)}: cast it first")
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise TypeError(f"{what} has byte order {array.dtype.str!r}; expected the machine's own byte order")
