"""The elements of strided arrays as evenly spaced runs, cut into chunks: what a compiled loop walks."""

from typing import Any

import numpy as np

from .layout import Layout
from .library import COMPUTE, ITEMSIZE

CHUNK = 16_384  # elements
# Columns of the work list: one row per run or chunk; positions and steps in bytes.
ARRAY, START, COUNT, P_AT, G_AT, S_AT, P_STEP, G_STEP, S_STEP = range(9)

Matrix = np.ndarray[Any, Any]


def real_dtype(dtype: str) -> str:
    return COMPUTE[dtype] if dtype.startswith("complex") else dtype


def runs_of(i: int, p: Layout, g: Layout, slot: Layout) -> Matrix:
    """The work of one variable: as few runs along one axis as the strides of all its arrays allow."""
    operands = [_axes(layout) for layout in (p, g, slot)]
    shape = operands[0][0]
    if 0 in shape:
        return np.zeros((0, 9), np.int64)
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
    inner = max(range(len(merged)), key=lambda k: (merged[k][1] == sizes and merged[k][0] >= 64, merged[k][0]))
    count, steps = merged.pop(inner)
    offsets = np.zeros((1, 3), np.int64)
    for size, strides in merged:
        offsets = (offsets[:, None, :] + np.arange(size)[None, :, None] * np.array(strides)).reshape(-1, 3)
    runs = np.zeros((len(offsets), 9), np.int64)
    runs[:, ARRAY], runs[:, COUNT] = i, count
    runs[:, P_AT : S_AT + 1] = offsets
    runs[:, P_STEP:] = steps
    return runs


def chunks_of(runs: Matrix) -> Matrix:
    """Runs of one variable cut into chunks whose size depends on nothing but its shape."""
    starts = np.arange(0, runs[0, COUNT], CHUNK)
    work = np.repeat(runs[:, None, :], len(starts), axis=1)
    work[:, :, COUNT] = np.minimum(runs[0, COUNT] - starts, CHUNK)
    work[:, :, P_AT : S_AT + 1] += starts[None, :, None] * runs[0, P_STEP:]
    return work.reshape(-1, 9)


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides in real numbers: a complex array has one more axis, of its real and imaginary parts."""
    if not layout.dtype.startswith("complex"):
        return layout.shape, layout.strides
    return (*layout.shape, 2), (*layout.strides, ITEMSIZE[layout.dtype] // 2)
