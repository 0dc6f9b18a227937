"""What is refused of the arrays of a step: some of it when a user's function is compiled, some when it runs."""

from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

from ..arrays.compiled import jit
from .literals import is_none, unliteral


def check_arrays(p, g, m, v, top):
    """Refuse types that are no arrays of one dtype and dimension; those that are written must be writable."""
    given = {"p": p, "g": g, "m": m, "v": v} | ({} if is_none(top) else {"velocity_hat": top})
    for name, kind in given.items():
        if not isinstance(kind, types.Array) or kind.dtype not in (types.float32, types.float64):
            raise TypingError(f"`{name}` is {kind}; expected an array of float32 or float64")
        if (kind.dtype, kind.ndim) != (p.dtype, p.ndim):
            raise TypingError(f"`{name}` is {kind}; expected {p.ndim} dimensions of {p.dtype}, as `p` has")
        if not kind.mutable and name != "g":
            raise TypingError(f"`{name}` is {kind}, which is read-only; expected an array that can be written")
        if not kind.aligned:
            raise TypingError(f"`{name}` is {kind}; expected an array whose elements are aligned")


@jit
def check_shapes(p, g, m, v, top):
    if g.shape != p.shape:
        raise ValueError("`g` must have the shape of `p`. Received the shapes:", g.shape, p.shape)
    if m.shape != p.shape:
        raise ValueError("`m` must have the shape of `p`. Received the shapes:", m.shape, p.shape)
    if v.shape != p.shape:
        raise ValueError("`v` must have the shape of `p`. Received the shapes:", v.shape, p.shape)
    if top is not None and top.shape != p.shape:
        raise ValueError("`velocity_hat` must have the shape of `p`. Received the shapes:", top.shape, p.shape)


@jit
def _share(one, other, dense):
    """Whether two arrays of one shape share memory; of those with gaps, whether they begin at one place."""
    if one.size == 0:
        return False
    if not dense:
        return one.ctypes.data == other.ctypes.data
    return one.ctypes.data < other.ctypes.data + other.nbytes and other.ctypes.data < one.ctypes.data + one.nbytes


@jit
def check_apart(p, g, m, v, top, dense):
    """Refuse arrays of which one would be overwritten by another."""
    if _share(p, g, dense) or _share(p, m, dense) or _share(p, v, dense):
        raise ValueError("`p` shares memory with `g`, `m` or `v`; expected arrays that do not overlap")
    if _share(g, m, dense) or _share(g, v, dense) or _share(m, v, dense):
        raise ValueError("two of `g`, `m` and `v` share memory; expected arrays that do not overlap")
    if top is not None and (
        _share(top, p, dense) or _share(top, g, dense) or _share(top, m, dense) or _share(top, v, dense)
    ):
        raise ValueError("`velocity_hat` shares memory with another array; expected arrays that do not overlap")


def checked(*elements):
    """The first of some elements, which have to be of one type of float."""
    return elements[0]


@overload(checked)
def _overload_checked(*elements):
    kinds = [unliteral(kind) for kind in elements]
    for name, kind in zip(("p", "g", "m", "v", "velocity_hat"), kinds, strict=False):
        if kind not in (types.float32, types.float64) or kind != kinds[0]:
            raise TypingError(f"`{name}` is {kind} and `p` is {kinds[0]}; expected float32 or float64 for all")
    return lambda *elements: elements[0]
