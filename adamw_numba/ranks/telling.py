"""What differs between ranks, in words."""

from collections.abc import Callable, Iterable, Sequence
from itertools import count, zip_longest
from typing import Any

from ..arrays.brief import brief
from .words import CALLS, MARKED


def different(told: list[Any]) -> str:
    """The first variable that is not the same everywhere, of what each rank has told of its own."""
    for k in range(max(map(len, told))):
        found = [brief(each[k]) if k < len(each) else "nothing" for each in told]
        if len(set(found)) > 1:
            return f"number {k} is {values(found, str)}"
    return "in a way that cannot be told"


def different_calls(told: Iterable[float]) -> str:
    """The calls that ranks make, and of which optimizers where these alone differ."""
    found = [divmod(int(each), MARKED) for each in told]
    if len({call for _, call in found}) > 1:
        return values([call for _, call in found], CALLS.__getitem__)
    return values(found, lambda each: f"{CALLS[each[1]]} of optimizer {each[0]:x}")


def different_sample(told: list[Any]) -> str:
    """The first gradient that is not the same everywhere, of what each rank has told of some."""
    for rank, others in enumerate(told):
        for own, other in zip_longest(told[0], others):
            if own != other:
                name = (own or other)[0]
                return f"that of {brief(name)} is another one on rank {rank} than on rank 0"
    return "in a way that cannot be told"


def values(found_values: Iterable[Any], form: Callable[[Any], Any], ranks: Sequence[int] | None = None) -> str:
    """Which values there are on which ranks."""
    found: dict[Any, list[int]] = {}
    for rank, value in zip(count() if ranks is None else ranks, found_values, strict=False):
        found.setdefault(form(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in list(found.items())[:4])


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
