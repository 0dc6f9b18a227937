"""A variable's number on the CPU: what it holds itself, with a master copy, or with the remainder of one."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ..arrays.compiled import jit
from ..arrays.masters import make_splitting
from .intrinsics import narrow, widen
from .words import bits_of, choose, number_of, word

LIKE: dict[str, Any] = {"": None, "float32": np.float32(0), "remainder": np.int16(0)}
_split, _joined, _ = make_splitting(jit, word, bits_of, number_of, choose)


def value_of(p, master, i):
    """An element's number: its float32 master, unless the user has written the variable since the last step.

    Then the master, rounded, is no longer what the variable holds. A remainder cannot tell.
    """
    raise NotImplementedError


@overload(value_of, inline="always")
def _overload_value_of(p, master, i):
    if isinstance(master, types.NoneType):
        return lambda p, master, i: widen(p[i])
    if master.dtype == types.int16:
        return lambda p, master, i: _joined(np.uint32(p[i]), np.uint32(np.uint16(master[i])))
    return lambda p, master, i: master[i] if narrow(master[i], p[i]) == p[i] else widen(p[i])


def put_value(p, master, i, value):
    """Store an element's number."""
    raise NotImplementedError


@overload(put_value, inline="always")
def _overload_put_value(p, master, i, value):
    if isinstance(master, types.NoneType):

        def put_value(p, master, i, value):
            p[i] = narrow(value, p[i])

    elif master.dtype == types.int16:

        def put_value(p, master, i, value):
            upper, remainder = _split(value)
            p[i] = np.uint16(upper)
            master[i] = np.int16(np.uint16(remainder))

    else:

        def put_value(p, master, i, value):
            p[i] = narrow(value, p[i])
            master[i] = value

    return put_value
