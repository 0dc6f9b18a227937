"""Arrays that are several, or another library's, as parts of one vector in memory: all that compiled code has to know.

A run's own arrays stay what they are. The vectors hold copies, which are brought in before a block of iterations and
brought home after it.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import array_api_compat
import numpy as np

from .. import arrays
from ..arrays import Array

Vector = np.ndarray[Any, Any]


def can_be_joined(leaves: Sequence[Array]) -> bool:
    """Whether arrays can be parts of one vector: float32 or float64, all alike, in the memory of this process."""
    dtypes = {arrays.dtype_name(leaf) for leaf in leaves}
    libraries = {arrays.library_name(leaf) for leaf in leaves}
    alike = len(dtypes) == 1 and (len(libraries) == 1 or "jax" not in libraries)
    return alike and dtypes <= {"float32", "float64"} and all(map(_is_near, leaves))


def _is_near(leaf: Array) -> bool:
    if array_api_compat.is_jax_array(leaf):
        devices = leaf.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return False
        (made,) = _of_jax([np.zeros(1, leaf.dtype)])
        return bool(made.devices() == devices)
    return type(leaf) is np.ndarray or (array_api_compat.is_torch_array(leaf) and arrays.place(leaf) == "cpu")


def _of_jax(copies: list[Vector]) -> list[Array]:
    """Arrays of JAX over memory that nobody else holds: all by one call, which takes half as long as one `asarray`."""
    made: list[Array] = _identity()(copies)
    if isinstance(made[0], np.ndarray):  # inside `jax.disable_jit`
        import jax

        return [jax.numpy.asarray(array) for array in made]
    return made


@cache
def _identity() -> Any:
    import jax

    return jax.jit(lambda arrays: arrays)


class Parts:
    """How arrays follow each other in a vector.

    Parameters
    ----------
    leaves : list of arrays
        Like those that are to be parts.
    """

    def __init__(self, leaves: Sequence[Array]) -> None:
        self._shapes = [tuple(leaf.shape) for leaf in leaves]
        ends = np.cumsum([math.prod(shape) for shape in self._shapes]).tolist()
        self._slices = [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]
        self._leaves = leaves
        self.size: int = ends[-1]
        self.are_lasting = all(map(arrays.is_mutable, leaves))  # what is `given`, while the vector changes

    def views(self, vector: Vector) -> list[Vector]:
        """The parts of a vector."""
        return [vector[part].reshape(shape) for part, shape in zip(self._slices, self._shapes, strict=True)]

    def given(self, views: Sequence[Vector]) -> list[Array]:
        """Arrays of the libraries that an objective expects: over the same memory, or copies where it is immutable."""
        if array_api_compat.is_jax_array(self._leaves[0]):
            return _of_jax([view.copy() for view in views])
        return [_like(leaf, view) for leaf, view in zip(self._leaves, views, strict=True)]


def _like(leaf: Array, view: Vector) -> Array:
    if array_api_compat.is_torch_array(leaf):
        import torch

        return torch.from_numpy(view)
    return view


def as_host(array: Array) -> Vector:
    """An array of any library as NumPy's, where it lies if that is possible."""
    if type(array) is np.ndarray:
        return array
    torch = sys.modules.get("torch")
    if torch is not None and type(array) is torch.Tensor:
        plain = array.detach().resolve_neg() if array.requires_grad or array.is_neg() else array
        found: Vector = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        return found
    return np.asarray(array) if array_api_compat.is_jax_array(array) else arrays.as_numpy(array)
