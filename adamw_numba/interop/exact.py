"""What an exact exchange checks: numbers that the other library holds as they are, counts and squares."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array

Matrix = np.ndarray[Any, Any]


def exact(array: Array, variable: Array, what: str) -> Matrix:
    """A slot as NumPy; refused where the variable's own dtype, in which others keep it, cannot hold it."""
    value = arrays.to_numpy(array)
    check_exact(value, arrays.dtype_name(variable), what)
    return value


def check_exact(value: Matrix, dtype: str, what: str) -> None:
    """Refuse numbers that would be rounded to a dtype."""
    if value.dtype.name != dtype and not _holds(value, dtype):
        raise ValueError(
            f"{what} would be rounded to {dtype}; expected numbers that {dtype} holds: there is no exact conversion"
        )


def _holds(value: Matrix, dtype: str) -> bool:
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            # NumPy has no bfloat16: it is the upper half of a float32.
            single = np.ascontiguousarray(value.astype(np.float32))
            return _holds(value, "float32") and not (single.view(np.uint32) & 0xFFFF).any()
        return bool(np.array_equal(value.astype(dtype).astype(value.dtype), value, equal_nan=value.dtype.kind in "fc"))


def check_squares(named: Mapping[str, Array]) -> None:
    """Refuse sums of squares that are below 0; of complex numbers torch keeps them part by part."""
    for what, array in named.items():
        value = arrays.to_numpy(array)
        if value.dtype.kind != "c" and (value < 0).any():
            raise ValueError(f"{what} holds {value.min()}; expected squares, which are >= 0")


def checked_count(value: Any, what: str) -> int:
    """A number of steps as an integer."""
    count = float(value)
    if not (0 <= count < 2**53 and count == int(count)):
        raise ValueError(f"{what} is {count}; expected a whole number >= 0")
    return int(count)
