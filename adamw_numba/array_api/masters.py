"""A variable's number by whole-array functions, with a master copy, or with the remainder of one."""

from functools import cache
from typing import Any

import array_api_compat

from ..arrays import SLOT, Array, dtype_name, namespace
from ..arrays.masters import REMAINDER, Splitting, make_splitting
from .words import bindings, number_of, word_of, words


@cache
def _splitting_of(xp: Any) -> Splitting:
    return make_splitting(*bindings(xp))


def value_of(xp: Any, p: Array, master: Array | None) -> Array:
    """A variable's number: see cpu/masters.py."""
    value = xp.astype(p, getattr(xp, SLOT[dtype_name(p)]))
    if master is None:
        return value
    if dtype_name(master) != REMAINDER:
        return xp.where(xp.astype(master, p.dtype) == p, master, value)
    joined: Array = _splitting_of(xp).joined(_low_word(xp, p), _low_word(xp, master))
    return joined


def put_value(xp: Any, p: Array, master: Array | None, value: Array) -> tuple[Array, Array | None]:
    """What the variable and its master become."""
    if master is None or dtype_name(master) != REMAINDER:
        return xp.astype(value, p.dtype), None if master is None else value
    upper, remainder = _splitting_of(xp).split(value)
    p = xp.astype(number_of(xp, word_of(xp, upper << words(xp, 16))), p.dtype)
    return p, xp.astype(remainder, xp.int16)


def converted(p: Array, master: Array, dtype: str) -> Array:
    """The master of a variable, a copy or a remainder, as it is kept in another dtype."""
    if dtype_name(master) == dtype:
        return master
    xp = namespace(master)
    if dtype != REMAINDER:
        return value_of(xp, p, master)
    return xp.astype(_splitting_of(xp).remainder_of(master), xp.int16)


def _low_word(xp: Any, x: Array) -> Array:
    """The 16 bits of each element."""
    return words(xp, x.view(xp.int16 if array_api_compat.is_torch_namespace(xp) else xp.uint16)) & words(xp, 0xFFFF)
