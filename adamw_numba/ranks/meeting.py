"""What ranks compare when they are connected: the variables that all of them have."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from .protocol import RankError


def checksums(names: Sequence[str], variables: Sequence[Array], which: Iterable[bool]) -> list[list[Any]]:
    """Some of the variables, with the checksums of their elements."""
    return [
        [name, zlib.crc32(np.ascontiguousarray(arrays.to_numpy(variable)).tobytes())]
        for name, variable, shared in zip(names, variables, which, strict=True)
        if shared
    ]


def check_shared(told: Sequence[dict[str, Any]], patterns: Sequence[str]) -> None:
    """Refuse replicated variables that are not the same everywhere, and patterns for none.

    Raises
    ------
    RankError, ValueError
    """
    for rank, others in enumerate(told):
        first, here = ([v[:3] for v in each["variables"] if v[0] in each["shared"]] for each in (told[0], others))
        if sorted(first) != sorted(here):
            raise RankError(
                f"the replicated variables differ: {brief(first)} on rank 0, {brief(here)} on rank {rank}; expected "
                "the same names, shapes and dtypes on all ranks"
            )
        if sorted(others["values"]) != sorted(told[0]["values"]):
            differ = [each[0] for each in told[0]["values"] if each not in others["values"]]
            raise RankError(
                f"the replicated variables differ: {brief_names(differ)} have other values on rank {rank} than on rank "
                "0; expected the same on all ranks"
            )
    found = {pattern for each in told for pattern in each["patterns"]}
    for pattern in patterns:
        if pattern not in found:
            raise ValueError(
                f"`replicated` holds {brief(pattern)}, which matches no variable of any rank; expected regular "
                "expressions for their names"
            )


def plain(value: Any) -> Any:
    """NumPy's scalars as Python's, for JSON: in what ranks tell each other, and in files.

    Raises
    ------
    TypeError
        If it is another object.
    """
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{brief(value)} is of type {type(value).__name__}; expected what JSON can hold")
