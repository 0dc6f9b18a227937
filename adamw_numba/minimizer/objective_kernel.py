"""The objective of a minimization as a C function of addresses, with its arguments as 64-bit words.

Compiled code calls it by its address, so that the loop does not have to be compiled again for each objective.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, cfunc, farray, njit, types
from numba.core.errors import NumbaError
from numpy.lib.stride_tricks import as_strided

from ..arrays.compiled import pointer
from ..cpu.kernels import LIKE
from .objective import is_compiled

# For compiled code to call: what lets Python call it as well would take longer to compile than most objectives.
_inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


def argument_words(args: Any) -> Any:
    """Arguments as 64-bit words (the first is a flag), what each is, and what must be kept alive; None if unknown."""
    words, specs, kept = [0], [], []
    for arg in args:
        scalar = _is_number(arg)
        array = np.array([arg]) if scalar else arg
        if not (isinstance(array, np.ndarray) and _is_plain(array)):
            return None
        layout = "C" if array.flags.c_contiguous else "F" if array.flags.f_contiguous else "A"
        specs.append((len(words), array.dtype.str, array.shape, array.strides, layout, scalar))
        words.append(array.ctypes.data)
        kept.append(array)
    return np.array(words, np.int64), tuple(specs), kept


def _is_number(arg):
    """Whether Numba takes an argument for a number of 64 bits or fewer."""
    if isinstance(arg, (bool, np.bool_)):
        return False
    if isinstance(arg, int):
        return -(2**63) <= arg < 2**63
    return isinstance(arg, (float, np.floating, np.integer))


def _is_plain(array):
    """Whether compiled code can read an array by its address."""
    known = array.dtype.kind in "iu" or array.dtype.name in ("float32", "float64", "complex64", "complex128")
    return known and type(array) is np.ndarray and array.flags.aligned and array.dtype.isnative


def _reader(spec):
    """Compiled code that makes one argument of the words."""
    at, dtype, shape, strides, layout, scalar = spec
    like = np.dtype(dtype).type(0)
    if scalar:
        return _inner(lambda words: carray(pointer(words[at], like), 1)[0])
    if layout == "C":
        return _inner(lambda words: carray(pointer(words[at], like), shape))
    if layout == "F":
        return _inner(lambda words: farray(pointer(words[at], like), shape))
    return _inner(lambda words: as_strided(carray(pointer(words[at], like), 1), shape, strides))


def _read_all(specs):
    """Compiled code that makes the tuple of all arguments."""
    if not specs:
        return _inner(lambda words: ())
    read, rest = _reader(specs[0]), _read_all(specs[1:])
    return _inner(lambda words: (read(words),) + rest(words))


def value_and_gradient(fun, jac, fills, ndim):
    """Compiled code that puts the gradient where it belongs and returns the value."""
    put = _inner(_put_row if ndim == 1 else _put)
    if fills:

        def both(x, g, args):
            g[...] = 0
            return float(fun(x, g, *args))
    elif jac is True:

        def both(x, g, args):
            f, gradient = fun(x, *args)
            put(g, gradient)
            return float(f)
    else:

        def both(x, g, args):
            f = fun(x.copy(), *args)  # it may write into what it is given
            put(g, jac(x, *args))
            return float(f)

    return _inner(both)


# Loops, since the error that `g[...] = gradient` may raise takes Numba three seconds to compile.


def _put_row(g, gradient):
    if gradient.shape != g.shape:
        raise ValueError("the gradient has another shape than `x`; expected the same")
    for i in range(g.size):
        g[i] = gradient[i]


def _put(g, gradient):
    if gradient.shape != g.shape:
        raise ValueError("the gradient has another shape than `x`; expected the same")
    for index in np.ndindex(g.shape):
        g[index] = gradient[index]


def objective_kernel(fun: Any, jac: Any, fills: bool, dtype: str, shape: Any, specs: Any) -> Any:
    """The objective as a C function of three addresses: the elements, the gradient, the words; None if it is not one.

    What it raises sets the first word; Python then calls it again, for the exception.
    """
    found, used = _objective_kernel(fun, jac, fills, dtype, shape, specs)
    if any(function.overloads.get(key) is not result for function, key, result in used):  # recompiled since
        _objective_kernel.cache_clear()
        found, used = _objective_kernel(fun, jac, fills, dtype, shape, specs)
    return found


@lru_cache(maxsize=64)
def _objective_kernel(fun: Any, jac: Any, fills: bool, dtype: str, shape: Any, specs: Any) -> Any:
    """The C function or None, and which compilations of the objective it may hold."""
    both, read, like = value_and_gradient(fun, jac, fills, len(shape)), _read_all(specs), LIKE[dtype]
    entries = len(specs) + 1

    def evaluate(x_address, g_address, address):
        words = carray(pointer(address, np.int64(0)), entries)
        x = carray(pointer(x_address, like), shape)
        g = carray(pointer(g_address, like), shape)
        value = np.nan
        try:
            value = both(x, g, read(words))
        except Exception:
            words[0] = 1
        return value

    try:
        found = cfunc(types.float64(types.intp, types.intp, types.intp))(evaluate)
    except NumbaError:
        found = None
    functions = [function for function in (fun, jac) if is_compiled(function)]
    return found, [(function, *item) for function in functions for item in function.overloads.items()]
