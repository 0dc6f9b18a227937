"""The walk over all elements of an update: compiled once, for whatever loops.

It goes through a part's chunks, describes a piece of one in a record, and calls a loop with that by its address: the
update, which is compiled for the types and options at hand and knows nothing of work lists, groups and prefetching. So
there is little to compile for a further variant. Loops for small moments take chunks whole, and cut them themselves.
"""

from functools import cache
from typing import Any

import numpy as np

from ..arrays.compiled import jit, numbers_at, pointer, words_at
from ..arrays.moments import BLOCK as MOMENTS_BLOCK
from ..arrays.runs import ARRAY, COUNT, G_AT, G_STEP, P_AT, P_STEP, PLACE, PLACE_STEP, S_AT, S_STEP
from ..update import M_SCALE, G, M, P, V
from . import blocks as b
from .intrinsics import ask_for, call_loop, exchange_mode, room


@jit
def _describe(at, task, block, work):
    """What holds for a whole chunk: where its operands are, the coefficients, and what noise follows from."""
    record = words_at(at)
    record[b.STEP + P], record[b.STEP + G], record[b.WIDTH] = work[P_STEP], work[G_STEP], work[S_STEP]
    record[b.STEP + M] = record[b.STEP + V] = work[S_STEP] >> block[b.HALVED + M]
    for k in range(task[b.FURTHER]):
        row = task[b.FURTHER + 1 + k]
        record[b.STEP + row] = work[S_STEP] >> block[b.HALVED + row]
    which, clip = b.factor_in(block, b.WHICH, work[ARRAY]), b.factor_in(block, b.CLIP, work[ARRAY])
    known = numbers_at(at + 8 * b.KNOWN)
    if which != known[0] or clip != known[1]:
        known[0], known[1] = which, clip
        doubles, floats = numbers_at(at + 8 * b.DOUBLES), pointer(at + 8 * b.FLOATS, np.float32(0))
        for k, value in enumerate(b.coefficients_of(block, work[ARRAY], np.float64(0))):
            doubles[k], floats[k] = value, value
    record[b.ASKS] = 0
    if task[b.ASK] != 0:
        numbers = numbers_at(block[b.NUMBERS])
        record[b.SEEDS], record[b.SEEDS + 1] = np.int64(numbers[b.SEED]), np.int64(numbers[b.NUMBER])
        record[b.SEEDS + 2] = np.int64(b.factor_in(block, b.NAME, work[ARRAY]))
    record[b.APART] = work[PLACE_STEP]


@jit
def _point(record, task, block, work, start):
    """Where the operands of a piece are."""
    table, arrays, a = words_at(block[b.TABLE]), block[b.ARRAYS], work[ARRAY]
    at = work[S_AT] + start * work[S_STEP]
    record[P] = table[P * arrays + a] + work[P_AT] + start * work[P_STEP]
    record[G] = table[G * arrays + a] + work[G_AT] + start * work[G_STEP]
    record[M] = table[M * arrays + a] + (at >> block[b.HALVED + M])
    record[V] = table[V * arrays + a] + (at >> block[b.HALVED + M])
    for k in range(task[b.FURTHER]):
        row = task[b.FURTHER + 1 + k]
        record[row] = table[row * arrays + a] + (at >> block[b.HALVED + row])


@jit
def _ask(record, task, block, first, n):
    """Ask for what is needed soon after n elements of a piece; for what scales in 8 bits follow from, a span sooner."""
    ahead, level, halved = block[b.AHEAD], block[b.LEVEL], block[b.HALVED + M]
    sooner = first + b.SPAN if halved == 2 else first
    ask_for(record[P] + ahead + first * record[b.STEP + P], n * record[b.STEP + P], level)
    ask_for(record[G] + ahead + sooner * record[b.STEP + G], n * record[b.STEP + G], level)
    for row in (M, V):
        ask_for(record[row] + ((ahead + sooner * record[b.WIDTH]) >> halved), n * record[b.STEP + M], level)
    for k in range(task[b.FURTHER]):
        row = task[b.FURTHER + 1 + k]
        if row < M_SCALE:
            at = record[row] + ((ahead + first * record[b.WIDTH]) >> block[b.HALVED + row])
            ask_for(at, n * record[b.STEP + row], level)


@jit
def _walk_chunk(at, task, block, work):
    record, exists = words_at(at), b.address_in(block, G, work[ARRAY]) != 0
    if not exists and task[b.AVERAGES] == 0:
        return
    _describe(at, task, block, work)
    piece, asks = block[b.PIECE], block[b.AHEAD] != 0 and block[b.STRIDED] == 0
    if task[b.ASK] != 0:
        record[b.CUT], record[b.ASKS] = min(piece, MOMENTS_BLOCK), task[b.ASK] if asks else 0
        piece, asks = b.WHOLE, False
    for start in range(0, work[COUNT], piece):
        left = work[COUNT] - start
        _point(record, task, block, work, start)
        record[b.LENGTH], record[b.FIRST] = min(piece, left), work[PLACE] + start * record[b.APART]
        if exists:
            if asks:
                _ask(record, task, block, 0, record[b.LENGTH])
            call_loop(task[b.UPDATE], at)
        else:
            record[G] = 0
        if task[b.AVERAGES] != 0:
            call_loop(task[b.AVERAGES], at)


@cache
def ask_loop() -> Any:
    """What loops call that cut their pieces themselves, before they take some elements."""

    @b.c_loop
    def ask_loop(at):
        record = words_at(at)
        task = words_at(record[b.TASK])
        _ask(record, task, words_at(task[b.BLOCK]), record[b.NEXT], record[b.CUT])

    return ask_loop


@cache
def walk_kernel() -> Any:
    """The kernel that all updates go through."""

    @b.c_kernel
    def walk(task_at, part, parts):
        task, at = words_at(task_at), room()
        block = words_at(task[b.BLOCK])
        first, last = b.share(block, part, parts)
        mode = exchange_mode(b.mode_of(block))
        words_at(at)[b.TASK] = task_at
        words_at(at)[b.OVERWRITES] = np.int64(numbers_at(block[b.NUMBERS])[b.OVERWRITE])
        numbers_at(at + 8 * b.KNOWN)[0] = -1.0  # no group
        for w in range(first, last):
            _walk_chunk(at, task, block, b.row_of_work(block, w))
        exchange_mode(mode)

    return walk
