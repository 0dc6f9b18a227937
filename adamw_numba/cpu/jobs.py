"""Jobs: the work of one kernel, cut into parts, which its owner shares with any helpers that watch the board.

The protocol. The owner takes a free row of the board, fills it in, and writes the number of parts that are left last.
From then on, any thread may take a part by counting that number down, and a part is valid if there was one left. This
holds no matter which job the row held when the thread looked at it: a helper that is late gets a part of the present
job, or none. That is why every field of a job is read *after* a part has been taken, and why the board is never freed.
The owner takes parts as well, until there are none; then it waits for those that others have taken but not finished.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..arrays.compiled import cached, call_plain, entry_point

# The board: a row of words for each job, and one more row, whose first word counts the helpers that watch. A job:
# whether somebody owns the row, how many more helpers it can take, the kernel, its block, into how many parts it is
# cut, how many of them are left (if none, nothing else in the row counts), and how many are done. A row takes two cache
# lines, so that threads which work on different jobs do not slow each other down.
OWNED, SEATS, KERNEL, BLOCK, PARTS, LEFT, DONE = range(7)
JOBS, JOB_WORDS = 8, 16
HELPERS = JOBS * JOB_WORDS
BOARD_WORDS = HELPERS + JOB_WORDS

_X86, _ARM = ("llvm.x86.sse2.pause",), ("llvm.aarch64.hint", 1)
_PAUSE = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(platform.machine())


@intrinsic
def _call(typingctx, address, block, part, parts):
    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        function = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [word] * 3).as_pointer())
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


def _atomic(operation):
    """An operation on an int64 in memory that is one step for all threads; it returns what was there before."""

    @intrinsic
    def atomic(typingctx, address, value):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
            return builder.atomic_rmw(operation, pointer, args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return atomic


_add, _exchange = _atomic("add"), _atomic("xchg")


@intrinsic
def _load(typingctx, address):
    """Read an int64 that other threads write; what they wrote before it can be read as well."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx, address, value):
    """Write an int64 that other threads read, and before it everything that was to be written earlier."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this thread waits for another, so that it saves power and lets a sibling core work."""

    def codegen(context, builder, signature, args):
        if _PAUSE:
            name, *numbers = _PAUSE
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(numbers))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [ir.Constant(word, number) for number in numbers])
        return context.get_dummy_value()

    return types.void(), codegen


# These run in the middle of a commit, or in other threads beside it, where compiling would be far too late. So their
# types are given, and they are compiled here and now.


@entry_point
@cached(types.void(types.int64, types.int64), nogil=True)
def run_serial(kernel, block):
    """Run a kernel alone: all of its work is one part."""
    _call(kernel, block, 0, 1)


@cached(types.void(types.int64), nogil=True)
def _take_parts(job):
    """Take parts of a job and do them, until none are left."""
    part = _add(job + 8 * LEFT, -1) - 1
    while part >= 0:
        _call(_load(job + 8 * KERNEL), _load(job + 8 * BLOCK), part, _load(job + 8 * PARTS))
        _add(job + 8 * DONE, 1)
        part = _add(job + 8 * LEFT, -1) - 1


@entry_point
@cached(types.void(*[types.int64] * 6), nogil=True)
def run_job(kernel, block, parts, seats, board, give_way):
    """Do a job together with at most `seats` helpers (and perhaps one who was late for the row's previous job).

    It waits for parts that others have started, and never for anybody to start one. If the board is full, it works
    alone.
    """
    for row in range(JOBS):
        job = board + 8 * JOB_WORDS * row
        if _load(job + 8 * OWNED) == 0 and _exchange(job + 8 * OWNED, 1) == 0:
            _store(job + 8 * KERNEL, kernel)
            _store(job + 8 * BLOCK, block)
            _store(job + 8 * PARTS, parts)
            _store(job + 8 * DONE, 1)
            _store(job + 8 * SEATS, seats)
            _exchange(job + 8 * LEFT, parts - 1)  # from here on, others may help; the last part is ours
            _call(kernel, block, parts - 1, parts)
            _take_parts(job)
            while _load(job + 8 * DONE) < parts:
                call_plain(give_way)
            _exchange(job + 8 * OWNED, 0)
            return
    _call(kernel, block, 0, 1)


@cached(types.void(*[types.int64] * 4), nogil=True)
def stand_by(board, spins, yields, give_way):
    """Watch the board and help with every job on it; stop, and be one helper less, when none has come for a while.

    The while is `spins` looks one after another, then `yields` more, between which other threads may run. A seat is
    taken by counting down too: whoever finds none left has counted below zero, which does no harm, since the next
    owner writes the number again.
    """
    idle = 0
    while idle < spins + yields:
        idle += 1
        for row in range(JOBS):
            job = board + 8 * JOB_WORDS * row
            if _load(job + 8 * LEFT) > 0 and _load(job + 8 * SEATS) > 0 and _add(job + 8 * SEATS, -1) > 0:
                _take_parts(job)
                idle = 0
        if idle <= spins:
            pause()
        else:
            call_plain(give_way)
    _add(board + 8 * HELPERS, -1)


@cached(types.void(types.int64, types.int64), nogil=True)
def count_helper(board, more):
    """Add to the number of helpers that watch."""
    _add(board + 8 * HELPERS, more)
