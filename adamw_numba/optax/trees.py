"""Trees of JAX arrays: their leaves as the step takes them, checked, and errors that have the path of a leaf."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..array_api.stateless import is_traced
from ..arrays import COMPUTE, SLOT, Array, dtype_name, is_complex, on_all_devices
from ..arrays.brief import brief, brief_names

Tree = Any


class Trained:
    """A tree of parameters, and others that are nested like it.

    Parameters
    ----------
    params : tree
        ``None``, and whatever else JAX takes for an empty tree, has no leaves and stays where it is.

    Attributes
    ----------
    leaves : list of arrays
    is_float : list of bool
        Whether each can be trained: integers and the like are carried along.
    own : list of int
        Which ones can.

    Raises
    ------
    TypeError
        If a leaf is no array of JAX or NumPy.
    """

    def __init__(self, params: Tree) -> None:
        import jax

        self._params = params
        leaves, self._form = jax.tree.flatten(params)
        self.leaves = [self._array(k, "`params`", leaf) for k, leaf in enumerate(leaves)]
        self.is_float = [dtype_name(leaf) in COMPUTE for leaf in self.leaves]
        self.own = [k for k, is_float in enumerate(self.is_float) if is_float]

    def tree(self, leaves: Sequence[Any]) -> Tree:
        """Other leaves, nested as the parameters are."""
        return self._form.unflatten(leaves)

    def like(self, tree: Tree, what: str) -> list[Array]:
        """The leaves of a tree that is nested like this, as arrays of the same shapes."""
        return [self._like(k, leaf, what) for k, leaf in enumerate(self._up_to(tree, what))]

    def beside(self, tree: Tree, what: str) -> list[Array | None]:
        """The same of any shapes, or None."""
        leaves = self._up_to(tree, what)
        return [None if leaf is None else self._array(k, what, leaf) for k, leaf in enumerate(leaves)]

    @cached_property
    def names(self) -> list[str]:
        """The paths of the leaves, as `adamw_numba.AdamW` names the arrays of such a container."""
        return [name or "0" for name in names(self._params)]

    def gradients(self, tree: Tree) -> list[Array | None]:
        """The leaves of a tree of gradients."""
        import jax

        what, found = "the gradients", list[Array | None]()
        for k, g in enumerate(self._up_to(tree, what)):
            if g is None or getattr(g, "dtype", None) == jax.dtypes.float0:
                found.append(None)
                continue
            array, p = self._like(k, g, what), self.leaves[k]
            if not self.is_float[k]:
                raise TypeError(
                    f"`params` at {self._name(k)}: dtype {dtype_name(p)}, with a gradient; expected one of "
                    f"{', '.join(COMPUTE)}, or None as gradient"
                )
            if dtype_name(array) not in COMPUTE or (is_complex(array) and not is_complex(p)):
                raise TypeError(
                    f"{what} at {self._name(k)}: dtype {dtype_name(array)}; expected one for {dtype_name(p)}"
                )
            found.append(array)
        return found

    def masked(self, mask: Tree) -> list[bool]:
        """The value of a mask for each leaf, where a mask is nested like the beginning of this tree, or makes it."""
        import jax

        if callable(mask) and jax.tree_util.all_leaves([mask]):  # what has leaves of its own is a module that is a mask
            mask = mask(self._params)
        values, form = jax.tree.flatten(mask)
        try:
            parts = form.flatten_up_to(self._params)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`mask` does not fit `params`: {brief(str(error))}") from None
        found: list[bool] = []
        for value, part in zip(values, parts, strict=True):
            if not isinstance(value, bool | np.bool_) and not _is_known_flag(value):
                raise TypeError(f"`mask` holds {brief(value)} for {self._name(len(found))}; expected True or False")
            found += [bool(value)] * len(jax.tree.leaves(part))
        return found

    def _up_to(self, tree: Tree, what: str) -> list[Any]:
        try:
            return self._form.flatten_up_to(tree)  # type: ignore[no-any-return]
        except (ValueError, TypeError) as error:
            own, others = names(self._params), names(tree)
            lacking, extra = ([n for n in one if n not in two] for one, two in ((own, others), (others, own)))
            if lacking or extra:
                found = f"lack {brief_names(lacking)}" * bool(lacking), f"have {brief_names(extra)}" * bool(extra)
                raise ValueError(f"{what} {' and '.join(filter(None, found))}; expected the tree of `params`") from None
            raise ValueError(
                f"{what} are nested otherwise than `params`: {brief(str(error))}; expected the same types"
            ) from None

    def _like(self, k: int, leaf: Any, what: str) -> Array:
        array, p = self._array(k, what, leaf), self.leaves[k]
        if array.shape != p.shape:
            raise ValueError(f"{what} at {self._name(k)}: shape {array.shape}; expected {p.shape}, its parameter's")
        return array

    def _array(self, k: int, what: str, leaf: Any) -> Array:
        import jax

        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"{what} at {self._name(k)}: {brief(leaf)} of type {type(leaf).__module__}.{type(leaf).__name__}; "
                "expected an array of JAX"
            )
        return jax.numpy.asarray(leaf)

    def _name(self, k: int) -> str:
        return brief(names(self._params)[k])


def names(tree: Tree) -> list[str]:
    """The paths of all leaves."""
    import jax

    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def real_dtype(name: str, value: Any) -> Any:
    """Check a dtype for real numbers; without x64 it is one of JAX's own."""
    import jax

    expected = f"`{name}` is {brief(value)}; expected a dtype of real numbers: float32, bfloat16, ..."
    try:
        dtype = jax.dtypes.canonicalize_dtype(value)
    except TypeError as error:
        raise TypeError(expected) from error
    if dtype.name not in COMPUTE or dtype.kind == "c":
        raise ValueError(expected)
    return dtype


def state_dtype(leaf: Array) -> Any:
    """The dtype of the state of a parameter; what is not trained keeps its own."""
    own = dtype_name(leaf)
    return SLOT.get(own, own)


def zeros(leaf: Array, dtype: Any = None) -> Array:
    """Zeros that lie where a parameter lies, and are no more bound to that place than it is."""
    import jax

    if dtype is None or is_complex(leaf) or dtype_name(leaf) not in COMPUTE:
        dtype = state_dtype(leaf)
    return jax.numpy.zeros_like(leaf, dtype=dtype)


def copied(leaf: Array) -> Array:
    """A copy of a parameter in the dtype of its state; for its place see `zeros`."""
    import jax

    copy = jax.numpy.array(leaf, dtype=state_dtype(leaf), copy=True)
    return jax.device_put(copy, leaf.sharding) if _is_placed(leaf) else copy


def counter(leaves: Sequence[Array]) -> Array:
    """A count of 0 that lies where parameters lie, on all their devices."""
    import jax

    return on_all_devices(jax.numpy.zeros((), jax.numpy.int32), leaves)


def _is_placed(leaf: Array) -> bool:
    """Whether somebody has put an array onto its devices, where it has to stay."""
    return not is_traced(leaf) and bool(leaf.committed)


def _is_known_flag(value: Any) -> bool:
    """Whether a value is an array that is True or False, and can be looked at."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    return dtype == np.bool_ and shape == () and not is_traced(value)
