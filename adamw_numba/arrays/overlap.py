"""Which of many arrays have memory in common: one sweep over their extents, in order of address."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Addresses = np.ndarray[Any, Any]  # int64


def overlapping(lows: Addresses, highs: Addresses) -> Iterator[tuple[int, int]]:
    """The pairs of extents that have a byte in common; whether their arrays do, which may have gaps, is yet to be seen.

    Parameters
    ----------
    lows, highs : arrays of int64
        The first byte of each array, and the one after its last: equal for an empty one.
    """
    order = np.argsort(lows, kind="stable")
    order = order[highs[order] > lows[order]]
    if (lows[order][1:] >= np.maximum.accumulate(highs[order])[:-1]).all():
        return
    still: list[int] = []  # the extents that reach beyond the beginning of the present one
    for k in order.tolist():
        still = [other for other in still if highs[other] > lows[k]]
        yield from ((other, k) for other in still)
        still.append(k)


def covered(lows: Addresses, highs: Addresses) -> Addresses:
    """The beginnings and ends of the memory that extents cover together, in order, shape (2, n)."""
    order = np.argsort(lows, kind="stable")
    order = order[highs[order] > lows[order]]
    lows, reach = lows[order], np.maximum.accumulate(highs[order])
    begins = np.ones(len(lows), np.bool_)
    begins[1:] = lows[1:] >= reach[:-1]
    ends = np.ones(len(lows), np.bool_)
    ends[:-1] = begins[1:]
    return np.array([lows[begins], reach[ends]], np.int64)


def touching(lows: Addresses, highs: Addresses, ranges: Addresses) -> Addresses:
    """Which extents have a byte in one of the ranges that `covered` has found."""
    beginnings = np.append(ranges[0], np.iinfo(np.int64).max)
    nearest = np.searchsorted(ranges[1], lows, side="right")  # the first range that ends above the beginning
    return np.flatnonzero((beginnings[nearest] < highs) & (lows < highs))
