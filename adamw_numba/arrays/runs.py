"""The elements of arrays as evenly spaced runs, cut into chunks: what a compiled loop walks."""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from .layout import Layout
from .library import COMPUTE, ITEMSIZE

CHUNK = 16_384  # elements
# Columns of the work list: one row per run or chunk; positions and steps in bytes. The last two count elements: where
# the first one is in the order of the axes of the whole variable, and how far apart they are there.
ARRAY, START, COUNT, P_AT, G_AT, S_AT, P_STEP, G_STEP, S_STEP, PLACE, PLACE_STEP, COLUMNS = range(12)

Matrix = np.ndarray[Any, Any]
Triple = tuple[Layout, Layout, Layout]  # of a variable, its gradient and its slots
Places = tuple[int, tuple[int, ...]]  # of elements in a whole variable: of the first, and the steps along each axis


def real_dtype(dtype: str) -> str:
    return COMPUTE[dtype] if dtype.startswith("complex") else dtype


def runs_by_kind(
    arrays: Iterable[int], layouts: Iterable[Triple], places: Iterable[Places | None] | None = None
) -> dict[tuple[str, str], Matrix]:
    """The runs of many variables in order, by how a variable and its gradient are stored.

    Where places are given, elements that follow each other in a run are also evenly spaced in the whole variable.

    Most variables are one run each, and there may be very many of them: their rows are plain integers until the end,
    since a NumPy array for each takes far longer to make than what it holds. Variables that are laid out alike, as
    those of equal layers, are looked at once.
    """
    seen: dict[tuple[Triple, Places | None], tuple[list[int], Matrix] | None] = {}
    found: dict[tuple[str, str], tuple[list[list[int]], list[Matrix]]] = {}
    for i, triple, place in zip(arrays, layouts, repeat(None) if places is None else places, strict=False):
        if (triple, place) not in seen:
            seen[triple, place] = _runs_of(*triple, place)
        runs = seen[triple, place]
        if runs is not None:
            row, offsets = runs
            rows, positions = found.setdefault((real_dtype(triple[0].dtype), real_dtype(triple[1].dtype)), ([], []))
            rows.append([i, *row])
            positions.append(offsets)
    return {kind: _table(rows, positions) for kind, (rows, positions) in found.items()}


def chunks_of(runs: Matrix) -> Matrix:
    """Runs cut into chunks whose size depends on nothing but the shape of their variable."""
    counts = -(-runs[:, COUNT] // CHUNK)
    work = np.repeat(runs, counts, axis=0)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(work)) - firsts) * CHUNK
    work[:, COUNT] = np.minimum(work[:, COUNT] - starts, CHUNK)
    work[:, P_AT : S_AT + 1] += starts[:, None] * work[:, P_STEP : S_STEP + 1]
    work[:, PLACE] += starts * work[:, PLACE_STEP]
    return work


def _runs_of(p: Layout, g: Layout, slot: Layout, place: Places | None) -> tuple[list[int], Matrix] | None:
    """As few runs along one axis as the strides of all arrays allow: a row but its first entry, and where each is."""
    operands = [_axes(layout) for layout in (p, g, slot)]
    shape, of_slots = operands[2]
    first, steps_there = (0, of_slots) if place is None else place
    if len(steps_there) < len(shape):  # of complex numbers
        first, steps_there = 2 * first, (*(2 * step for step in steps_there), 1)
    operands.append((shape, steps_there))
    if 0 in shape:
        return None
    # From the largest stride of the slots down, so that an axis which continues the one before it comes next to it.
    axes = sorted(
        ((size, strides) for size, *strides in zip(shape, *(o[1] for o in operands), strict=True) if size > 1),
        key=lambda axis: -abs(axis[1][2]),
    )
    sizes = [*(ITEMSIZE[real_dtype(layout.dtype)] for layout in (p, g, slot)), 1]
    merged: list[tuple[int, list[int]]] = []
    for size, strides in axes:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = merged[-1][0] * size, strides
        else:
            merged.append((size, strides))
    if not merged:
        merged.append((1, sizes))
    # The loop runs along the longest axis; a dense one of some length is better, for it is compiled without strides.
    inner = max(range(len(merged)), key=lambda k: (merged[k][1][:3] == sizes[:3] and merged[k][0] >= 64, merged[k][0]))
    count, steps = merged.pop(inner)
    return [0, count, 0, 0, 0, *steps[:3], first, steps[3]], _offsets(merged)


def _offsets(outer: Sequence[tuple[int, list[int]]]) -> Matrix:
    """Where the runs begin, in bytes: one for each combination of indices along the outer axes."""
    offsets = _AT_THE_START
    for size, strides in outer:
        offsets = (offsets[:, None, :] + np.arange(size)[None, :, None] * np.array(strides)).reshape(-1, 4)
    return offsets


def _table(rows: list[list[int]], offsets: list[Matrix]) -> Matrix:
    table = np.array(rows, np.int64)
    if len(rows) < sum(map(len, offsets)):
        table = np.repeat(table, [len(each) for each in offsets], axis=0)
    positions = np.concatenate(offsets)
    table[:, P_AT : S_AT + 1] = positions[:, :3]
    table[:, PLACE] += positions[:, 3]
    return table


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides in real numbers: a complex array has one more axis, of its real and imaginary parts."""
    if not layout.dtype.startswith("complex"):
        return layout.shape, layout.strides
    return (*layout.shape, 2), (*layout.strides, ITEMSIZE[layout.dtype] // 2)


_AT_THE_START = np.zeros((1, 4), np.int64)
