"""What ranks compare when they are connected: the variables that all of them have."""

import zlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from .protocol import RankError

SAMPLED = 8  # gradients, and elements of each


def checksums(names: Sequence[str], variables: Sequence[Array], which: Iterable[bool]) -> list[list[Any]]:
    """Some of the variables, with the checksums of their elements."""
    return [
        [name, zlib.crc32(np.ascontiguousarray(arrays.to_numpy(variable)).tobytes())]
        for name, variable, shared in zip(names, variables, which, strict=True)
        if shared
    ]


def sampled(gradients: Sequence[tuple[str, Array | None]], number: int) -> list[list[Any]]:
    """Which of some gradients are lacking, and checksums of some elements of some others: of others at each step."""
    those = [(name, g) for name, g in gradients if g is not None]
    found: list[list[Any]] = [[name, None] for name, g in gradients if g is None]
    for k in range(min(len(those), SAMPLED)):
        name, gradient = those[(number * SAMPLED + k) % len(those)]
        flat = arrays.detached(gradient).reshape(-1)
        stride = max(flat.shape[0] // SAMPLED, 1)
        some = flat[number % stride :: stride][:SAMPLED]
        found.append([name, zlib.crc32((arrays.to_numpy(some) + 0).tobytes())])  # without the sign of a zero
    return found


def check_overrides(told: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """For each variable of any rank which overrides are for it, once they have been found to be the same everywhere.

    Raises
    ------
    RankError
    """
    asked: dict[str, tuple[int, ...]] = {}
    for rank, (others, variables, _) in enumerate(told):
        for k, (own, other) in enumerate(zip_longest(told[0][0], others)):
            if own != other:
                here, there = (_shown(*each) if each else "none" for each in (own, other))
                raise RankError(
                    f"the calls of `override` and `exclude_from_weight_decay` differ: number {k} is {here} on rank 0, "
                    f"{there} on rank {rank}; expected the same on all ranks, by `var_names` where some lack variables"
                )
        for name, which in variables:
            if asked.setdefault(name, tuple(which)) != tuple(which):
                first = next(k for k, (_, those, _) in enumerate(told) if name in dict(those))
                raise RankError(
                    f"the calls of `override` and `exclude_from_weight_decay` that are for {brief(name)} differ: their "
                    f"numbers are {list(asked[name])} on rank {first}, {which} on rank {rank}; expected the same"
                )
    return asked


def _shown(called: str, own: Any, patterns: list[str]) -> str:
    return f"`{called}` of {brief(own)}{f' for {brief(patterns)}' if patterns else ''}"


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
