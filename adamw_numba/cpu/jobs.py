"""Jobs: a kernel's work in parts, which the thread that wants it done shares with whoever helps.

A job lies in a row of the bench, which is never freed. A part is taken by counting down the parts that are left; it is
valid if there were any, whatever job the row held when a helper came by, so one who comes late gets a part of the
present job or none.
"""

import platform

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..arrays.compiled import cached, call_plain, entry_point

# The bench: rows of words, one job each; and one more row, of which the first word counts the helpers. A job: whether
# somebody owns the row, how many more may help, a kernel, its block, into how many parts it is cut, how many of them
# are not taken yet (none: whatever else the row holds is void), and how many are done.
OWNED, SEATS, KERNEL, BLOCK, PARTS, LEFT, DONE = range(7)
JOBS, JOB_WORDS = 8, 16
HELPERS = JOBS * JOB_WORDS
BENCH_WORDS = HELPERS + JOB_WORDS

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
    """An operation on an int64 in memory that no other thread comes in between; it returns what was there."""

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
    """An int64 in memory that other threads write."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx, address, value):
    """Write an int64 that other threads read."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this thread waits for another."""

    def codegen(context, builder, signature, args):
        if _PAUSE:
            name, *numbers = _PAUSE
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(numbers))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [ir.Constant(word, number) for number in numbers])
        return context.get_dummy_value()

    return types.void(), codegen


# These run while a step is committed, or beside it: compiled here and now, not at their first call.


@entry_point
@cached(njit, types.void(types.int64, types.int64), nogil=True)
def run_serial(kernel, block):
    """Call a kernel for all of its work."""
    _call(kernel, block, 0, 1)


@cached(njit, types.void(types.int64), nogil=True)
def _take_parts(job):
    """Do parts of a job that nobody has taken yet, until there are none."""
    part = _add(job + 8 * LEFT, -1) - 1
    while part >= 0:
        _call(_load(job + 8 * KERNEL), _load(job + 8 * BLOCK), part, _load(job + 8 * PARTS))
        _add(job + 8 * DONE, 1)
        part = _add(job + 8 * LEFT, -1) - 1


@entry_point
@cached(njit, types.void(*[types.int64] * 6), nogil=True)
def run_job(kernel, block, parts, seats, bench, give_way):
    """Do a job together with whoever helps: no more than `seats`, and one who was late for the row's last job.

    Waits for parts that others have begun, not for others to begin; alone if the bench is full.
    """
    for row in range(JOBS):
        job = bench + 8 * JOB_WORDS * row
        if _load(job + 8 * OWNED) == 0 and _exchange(job + 8 * OWNED, 1) == 0:
            _store(job + 8 * KERNEL, kernel)
            _store(job + 8 * BLOCK, block)
            _store(job + 8 * PARTS, parts)
            _store(job + 8 * DONE, 1)
            _store(job + 8 * SEATS, seats)
            _exchange(job + 8 * LEFT, parts - 1)  # from here on others may help; the last part is ours
            _call(kernel, block, parts - 1, parts)
            _take_parts(job)
            while _load(job + 8 * DONE) < parts:
                call_plain(give_way)
            _exchange(job + 8 * OWNED, 0)
            return
    _call(kernel, block, 0, 1)


@cached(njit, types.void(*[types.int64] * 4), nogil=True)
def stand_by(bench, looks, polite, give_way):
    """Help with every job there is, until there has been none for so many looks; then be one helper less.

    After that come `polite` looks more, between which other threads may run.
    """
    idle = 0
    while idle < looks + polite:
        idle += 1
        for row in range(JOBS):
            job = bench + 8 * JOB_WORDS * row
            if _load(job + 8 * LEFT) > 0 and _load(job + 8 * SEATS) > 0 and _add(job + 8 * SEATS, -1) > 0:
                _take_parts(job)
                idle = 0
        if idle <= looks:
            _pause()
        else:
            call_plain(give_way)
    _add(bench + 8 * HELPERS, -1)


@cached(njit, types.void(types.int64, types.int64), nogil=True)
def count_helper(bench, more):
    """Add to the number of helpers."""
    _add(bench + 8 * HELPERS, more)
