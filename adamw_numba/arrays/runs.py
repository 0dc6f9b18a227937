"""The elements of arrays as evenly spaced runs, cut into chunks: what a compiled loop walks."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .layout import Layout
from .library import COMPUTE, ITEMSIZE

CHUNK = 16_384  # elements
# Columns of the work list: one row per run or chunk; positions and steps in bytes.
ARRAY, START, COUNT, P_AT, G_AT, S_AT, P_STEP, G_STEP, S_STEP = range(9)

Matrix = np.ndarray[Any, Any]
Triple = tuple[Layout, Layout, Layout]  # of a variable, its gradient and its slots


def real_dtype(dtype: str) -> str:
    return COMPUTE[dtype] if dtype.startswith("complex") else dtype


def runs_by_kind(arrays: Iterable[int], layouts: Iterable[Triple]) -> dict[tuple[str, str], Matrix]:
    """The runs of many variables in order, by how a variable and its gradient are stored.

    Most variables are one run each, and there may be very many of them: their rows are plain integers until the end,
    since a NumPy array for each takes far longer to make than what it holds. Variables that are laid out alike, as
    those of equal layers, are looked at once.
    """
    seen: dict[Triple, tuple[list[int], Matrix] | None] = {}
    found: dict[tuple[str, str], tuple[list[list[int]], list[Matrix]]] = {}
    for i, triple in zip(arrays, layouts, strict=True):
        if triple not in seen:
            seen[triple] = _runs_of(*triple)
        runs = seen[triple]
        if runs is not None:
            row, offsets = runs
            rows, places = found.setdefault((real_dtype(triple[0].dtype), real_dtype(triple[1].dtype)), ([], []))
            rows.append([i, *row])
            places.append(offsets)
    return {kind: _table(rows, places) for kind, (rows, places) in found.items()}


def chunks_of(runs: Matrix) -> Matrix:
    """Runs cut into chunks whose size depends on nothing but the shape of their variable."""
    counts = -(-runs[:, COUNT] // CHUNK)
    work = np.repeat(runs, counts, axis=0)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(work)) - firsts) * CHUNK
    work[:, COUNT] = np.minimum(work[:, COUNT] - starts, CHUNK)
    work[:, P_AT : S_AT + 1] += starts[:, None] * work[:, P_STEP:]
    return work


def _runs_of(p: Layout, g: Layout, slot: Layout) -> tuple[list[int], Matrix] | None:
    """As few runs along one axis as the strides of all arrays allow: a row but its first entry, and where each is."""
    operands = [_axes(layout) for layout in (p, g, slot)]
    shape = operands[0][0]
    if 0 in shape:
        return None
    # From the largest stride of the slots down, so that an axis which continues the one before it comes next to it.
    axes = sorted(
        ((size, strides) for size, *strides in zip(shape, *(o[1] for o in operands), strict=True) if size > 1),
        key=lambda axis: -abs(axis[1][2]),
    )
    sizes = [ITEMSIZE[real_dtype(layout.dtype)] for layout in (p, g, slot)]
    merged: list[tuple[int, list[int]]] = []
    for size, strides in axes:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = merged[-1][0] * size, strides
        else:
            merged.append((size, strides))
    if not merged:
        merged.append((1, sizes))
    # The loop runs along the longest axis; a dense one of some length is better, for it is compiled without strides.
    inner = max(range(len(merged)), key=lambda k: (merged[k][1] == sizes and merged[k][0] >= 64, merged[k][0]))
    count, steps = merged.pop(inner)
    return [0, count, 0, 0, 0, *steps], _offsets(merged)


def _offsets(outer: Sequence[tuple[int, list[int]]]) -> Matrix:
    """Where the runs begin, in bytes: one for each combination of indices along the outer axes."""
    offsets = _AT_THE_START
    for size, strides in outer:
        offsets = (offsets[:, None, :] + np.arange(size)[None, :, None] * np.array(strides)).reshape(-1, 3)
    return offsets


def _table(rows: list[list[int]], offsets: list[Matrix]) -> Matrix:
    table = np.array(rows, np.int64)
    if len(rows) < sum(map(len, offsets)):
        table = np.repeat(table, [len(each) for each in offsets], axis=0)
    table[:, P_AT : S_AT + 1] = np.concatenate(offsets)
    return table


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides in real numbers: a complex array has one more axis, of its real and imaginary parts."""
    if not layout.dtype.startswith("complex"):
        return layout.shape, layout.strides
    return (*layout.shape, 2), (*layout.strides, ITEMSIZE[layout.dtype] // 2)


_AT_THE_START = np.zeros((1, 3), np.int64)
