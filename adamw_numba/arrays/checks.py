"""Every check on an array that a user hands over; errors name the variable."""

import sys
from collections.abc import Sequence

import array_api_compat
import numpy as np

from . import dtensors, gpu
from .advice import advice
from .brief import brief
from .foreign import origin, seen
from .layout import address, extent, is_aligned, layout_of, overlaps_itself, signature
from .library import COMPUTE, SLOT, Array, device, dtype_name, family, is_array, is_complex, library_name


def check_variables(names: Sequence[str], variables: Sequence[Array]) -> None:
    """Check many variables: what is found of one holds for all others of its signature that lie somewhere."""
    fine: set[object] = set()
    for name, variable in zip(names, variables, strict=True):
        found = signature(variable)
        if found is None or found not in fine or not address(variable):
            check_variable(name, variable)
            fine.add(found)


def check_variable(name: str, array: Array) -> None:
    """Refuse what cannot be trained in place or could be read wrongly; errors name the variable."""
    what = f"variable {brief(name)}"
    if not is_array(array):
        raise TypeError(f"{what} is {brief(array)} of type {type(array).__name__}; {advice(array)}")
    if dtensors.is_dtensor(array):
        dtensors.check_placements(what, array)
        _check_leaf(what, array)
    given, array = array, seen(array, what)
    kind = family(array)
    if kind == "cuda":
        gpu.require(what, given)
        if gpu.is_read_only(array):
            raise ValueError(f"{what} is read-only; expected an array that can be written")
    elif kind == "numpy":
        _check_ndarray(what, array)
        if given is not array and not array.flags.writeable:
            raise ValueError(
                f"{what} is read-only, or does not say that it may be written, which DLPack does from version 1.0 on; "
                f"expected an array that can be written. Received: {brief(given)}"
            )
        _check_writable(what, array)
    if array_api_compat.is_torch_array(array):
        check_tensor(what, array)
        _check_leaf(what, array)
    _check_dtype(what, array)
    if kind == "cuda" and not is_aligned(array):
        raise ValueError(f"{what} is not aligned in memory; expected an aligned array: pass a copy")
    # Nearly all arrays are dense: asking whether is much faster than reading where every element lies.
    if kind != "array_api" and not _is_dense(array) and overlaps_itself(layout := layout_of(array)):
        raise ValueError(
            f"{what} holds several elements at one address (shape {tuple(array.shape)}, strides {layout.strides} "
            "bytes); expected an array that is not broadcast: pass a copy"
        )


def check_gradient(name: str, gradient: Array, variable: Array) -> None:
    """Refuse a gradient that does not belong to its variable; errors name the variable."""
    what = f"the gradient of {brief(name)}"
    if gradient is variable:
        raise ValueError(f"{what} is the variable itself and so shares memory with it; expected its gradient")
    if not is_array(gradient):
        raise TypeError(f"{what} is {brief(gradient)} of type {type(gradient).__name__}; {advice(gradient)}, or None")
    if family(gradient) != family(variable) or library_name(gradient) != library_name(variable):
        raise TypeError(
            f"{what} is an array of {library_name(origin(gradient))} on {device(gradient)}; expected one of "
            f"{library_name(origin(variable))} on {device(variable)}, like its variable"
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


def check_tensor(what: str, array: Array, of_state: bool = False) -> None:
    """Refuse a tensor whose elements are not all at one place in memory; one of the state may be of integers."""
    tensor = sys.modules["torch"].Tensor
    # A subclass that dispatches for itself (DTensor, fake or quantized tensors) only wraps what holds the elements.
    if type(array).__torch_dispatch__ is not tensor.__torch_dispatch__:
        raise TypeError(f"{what} is a {type(array).__name__}, which keeps its elements elsewhere; expected a tensor")
    if str(array.layout) != "torch.strided":
        raise TypeError(f"{what} has layout {array.layout}; expected a dense tensor: pass `to_dense()`")
    if array.device.type == "meta":
        raise TypeError(f"{what} is on device meta, where nothing is stored; expected a tensor with data")
    if not of_state:
        _check_dtype(what, array)
    # A tensor keeps its shape when its storage is resized or freed, and its kernels would then write beyond the end.
    try:
        held = array.untyped_storage().nbytes() - array.storage_offset() * array.element_size()
        low, high = extent(layout_of(array)._replace(address=0)) if array.device.type in ("cpu", "cuda") else (0, 0)
        whole = high == 0 or (low >= 0 and high <= held and array.data_ptr() != 0)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise TypeError(
            f"{what} is a tensor whose elements are not at one place in memory ({brief(error)}); expected one that is"
        ) from None
    if not whole:
        raise ValueError(
            f"{what} has shape {tuple(array.shape)}, but its storage holds {held} bytes; expected all of it"
        )


def read_directly(gradient: Array, variable: Array) -> bool:
    """Whether the kernels of a host variable read this gradient where it lies; others are cast into a scratch copy."""
    if isinstance(gradient, np.ndarray):
        plain = bool(gradient.flags.aligned)
    elif array_api_compat.is_torch_array(gradient):
        plain = (
            not gradient.is_conj() and not gradient.is_neg()
        )  # else the values in memory are not those of the tensor
    else:
        plain = not isinstance(gradient, np.generic) and is_aligned(gradient)
    return plain and dtype_name(gradient) in (dtype_name(variable), SLOT[dtype_name(variable)])


def _check_ndarray(what: str, array: Array) -> None:
    if isinstance(array, np.ndarray) and type(array) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}; expected a plain numpy.ndarray (or "
            "numpy.memmap): pass `numpy.asarray(array)`, having dealt with what the subclass adds"
        )


def _check_writable(what: str, array: Array) -> None:
    if isinstance(array, np.generic):
        raise TypeError(
            f"{what} is the NumPy scalar {brief(array)}, which cannot be updated in place; expected an array, for "
            "example `np.asarray(value)`"
        )
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only; expected an array whose `flags.writeable` is True")
    if not array.flags.aligned:
        raise ValueError(f"{what} is not aligned in memory; expected an aligned array: pass a copy")


def _check_leaf(what: str, array: Array) -> None:
    if array.requires_grad and not dtensors.is_local(array) and not array.is_leaf:
        raise ValueError(f"{what} is not a leaf of the autograd graph; expected a leaf tensor")
    if array.is_conj() or array.is_neg():
        raise ValueError(f"{what} is a lazy conjugate or negative; pass `resolve_conj().resolve_neg()`")


def _check_dtype(what: str, array: Array) -> None:
    name = dtype_name(array)
    if name not in COMPUTE:
        raise TypeError(f"{what} has dtype {brief(name)[1:-1]}; expected one of {', '.join(COMPUTE)}: cast it first")
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise TypeError(f"{what} has byte order {array.dtype.str!r}; expected the machine's own byte order")


def _is_dense(array: Array) -> bool:
    if isinstance(array, np.ndarray):
        return bool(array.flags.forc)
    return bool(array_api_compat.is_torch_array(array) and array.is_contiguous())
