"""What a minimization measures of its arrays, whatever library they are of."""

import zlib
from collections.abc import Sequence

import numpy as np

from .. import arrays
from ..arrays import Array


def checksum(leaves: Sequence[Array]) -> int:
    """Of all elements."""
    total = 0
    for leaf in leaves:
        total = zlib.crc32(np.ascontiguousarray(arrays.to_numpy(leaf)).tobytes(), total)
    return total


def largest(leaves: Sequence[Array]) -> float:
    """The largest magnitude of any element; NaN if one is."""
    found = [float(_magnitude(leaf)) for leaf in leaves if 0 not in leaf.shape]
    return float(np.max(found, initial=0.0))


def _magnitude(leaf: Array) -> Array:
    if isinstance(leaf, np.ndarray):
        return np.abs(leaf).max()
    xp = arrays.namespace(leaf)
    return xp.max(xp.abs(leaf))


def difference(x: Array, before: Array) -> Array:
    """How far each element is from where it was."""
    with np.errstate(all="ignore"):
        return x - before


def cast(gradient: Array, like: Array) -> Array:
    """A gradient in the dtype of its buffer; what is too large becomes infinite."""
    if gradient.dtype == like.dtype:
        return gradient
    if isinstance(gradient, np.ndarray):
        with np.errstate(all="ignore"):
            return gradient.astype(like.dtype)
    return arrays.namespace(gradient).astype(gradient, like.dtype)
