"""What Numba itself does not offer: 16-bit floats, the processor's floating-point mode, and prefetching.

Numba sees a 16-bit element as an integer: ``int16`` stands for float16 and ``uint16`` for bfloat16.
"""

import platform
import re
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..arrays.compiled import jit

# Modes of an x86 processor (its register MXCSR). Both mask all exceptions and round to nearest; the second also turns
# subnormal results into 0. A float32 momentum becomes subnormal 830 steps after its gradients have stopped, and stays
# so, and the processor takes twenty times as long for a step with such numbers.
EXACT, FLUSHING = np.uint32(0x1F80), np.uint32(0x9F80)
# Gradients may be multiplied by a factor that is itself nearly subnormal (a tiny clip norm, a huge loss scale) although
# their product is not. Such a factor must not become 0.
LEAST_FLUSHED = 2.0**-100
ROOM = 1024  # bytes on the stack
_HAS_MODE = platform.machine() in ("x86_64", "AMD64")


# float16 to float32 and back with integers, for processors that have no instruction for it. There are no branches, only
# choices between values, so that the loops around them still become vectors. Subnormal numbers need one addition of
# floats, which moves their bits into place.


def half_to_float(bits):
    """The float32 of a float16's bits: exact, a signalling NaN made quiet."""
    word = np.uint32(np.uint16(bits))
    magnitude = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13))  # all of float16's mantissa, and its exponent
    # A subnormal number is a multiple of 2^-24, the unit of 2^-14's mantissa: put it there, and take 2^-14 away again.
    small = np.float32(np.uint32(magnitude + np.uint32(0x38800000)).view(np.float32) - np.float32(2.0**-14))
    moved = np.uint32(magnitude + np.uint32(0x38000000))  # 112 is the difference of the exponents' biases
    special = np.uint32(magnitude + np.uint32(0x70000000))  # infinities and NaN, from exponent 31 to 255: twice that
    special = np.uint32(special | np.uint32(0x00400000)) if special > np.uint32(0x7F800000) else special
    result = special if magnitude >= np.uint32(0x0F800000) else moved
    result = small.view(np.uint32) if magnitude < np.uint32(0x00800000) else result
    return np.uint32(result | np.uint32((word & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


def float_to_half(x):
    """The bits of the float16 nearest to a float32, ties to even; NaN stay NaN, quiet, with what fits of their bits."""
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # The last bit of 0.5 is worth 2^-24, as that of a subnormal float16: adding 0.5 rounds as it should be rounded.
    small = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    small = np.uint32(small.view(np.uint32) - np.uint32(0x3F000000))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    quiet = np.uint32(np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x1FF)))
    special = quiet if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    result = rounded if magnitude >= np.uint32(0x38800000) else small
    result = special if magnitude >= np.uint32(0x47800000) else result
    return np.int16(np.uint32(result | ((bits >> np.uint32(16)) & np.uint32(0x8000))))


@cache
def _converts_halves(triple, processor, features):
    """Whether LLVM has instructions for float16 on a target.

    Without them it calls a function of the compiler's runtime library. That is not there, and so LLVM ends the process.
    LLVM itself knows best which processors have them: it compiles one conversion, and we look at what it made of it.
    """
    module, half, single = ir.Module(), ir.HalfType(), ir.FloatType()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(half, [half]), "convert")
    builder = ir.IRBuilder(function.append_basic_block())
    wide = builder.fpext(function.args[0], single)
    builder.ret(builder.fptrunc(builder.fmul(wide, wide), half))
    machine = llvm.Target.from_triple(triple).create_target_machine(processor, features)
    return not re.search("__extendhfsf2|__truncsfhf2|__gnu_", machine.emit_assembly(llvm.parse_assembly(str(module))))


@intrinsic
def _half_to_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        if not _converts_halves(*context.codegen().magic_tuple()):
            return context.compile_internal(builder, half_to_float, signature, args)
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


@intrinsic
def _float_to_half(typingctx, value):
    def codegen(context, builder, signature, args):
        if not _converts_halves(*context.codegen().magic_tuple()):
            return context.compile_internal(builder, float_to_half, signature, args)
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


def widen(x):
    """The number that a stored element stands for: its own, or the float32 of a 16-bit float."""
    raise NotImplementedError


@overload(widen, inline="always")
def _overload_widen(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return lambda x: _half_to_float(x)
    return lambda x: x


def narrow(x, like):
    """What is stored for a number, in the dtype of `like`: the nearest, ties to even."""
    raise NotImplementedError


@jit
def _float_to_bfloat(x):
    bits = np.float32(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.uint16(quiet if x != x else rounded)


@overload(narrow, inline="always")
def _overload_narrow(x, like):
    if like == types.uint16:
        return lambda x, like: _float_to_bfloat(x)
    if like == types.int16:
        return lambda x, like: _float_to_half(x)
    return lambda x, like: x


@intrinsic
def muladd(typingctx, a, b, c):
    """a * b + c, rounded once on a processor that can do so, and in two steps on others."""
    kind = typingctx.unify_types(*(x.type if isinstance(x, types.Optional) else x for x in (a, b, c)))

    def codegen(context, builder, signature, args):
        number = context.get_value_type(kind)
        function = builder.module.declare_intrinsic("llvm.fmuladd", [number], ir.FunctionType(number, [number] * 3))
        return builder.call(function, args)

    return kind(kind, kind, kind), codegen


@intrinsic
def exchange_mode(typingctx, mode):
    """Set the processor's floating-point mode; return what it was, to be put back: the thread is the user's."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        if not _HAS_MODE:  # elsewhere subnormal numbers stay what they are
            return ir.Constant(word, 0)
        place = cgutils.alloca_once(builder, word)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        store, load = (
            cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{n}mxcsr") for n in ("st", "ld")
        )
        address = builder.bitcast(place, ir.IntType(8).as_pointer())
        builder.call(store, [address])
        before = builder.load(place)
        builder.store(args[0], place)
        builder.call(load, [address])
        return before

    return types.uint32(types.uint32), codegen


@intrinsic
def room(typingctx):
    """The address of `ROOM` bytes on the stack of the calling function."""

    def codegen(context, builder, signature, args):
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), ROOM // 8))
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.intp(), codegen


@intrinsic
def call_loop(typingctx, address, record):
    """Call a C function that takes an address, by its own."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [word]).as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@jit
def mode_for(scale):
    """The mode in which to update variables whose gradients are multiplied by `scale`."""
    return FLUSHING if scale >= LEAST_FLUSHED else EXACT


def _prefetch_into(level):
    """Ask for a cache line that will soon be read; an address that does not exist does no harm."""

    @intrinsic
    def prefetch(typingctx, address):
        def codegen(context, builder, signature, args):
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            for_reading, keep, data = (ir.Constant(word, number) for number in (0, 4 - level, 1))
            builder.call(function, [builder.inttoptr(args[0], byte), for_reading, keep, data])
            return context.get_dummy_value()

        return types.void(types.intp), codegen

    return prefetch


_into_first, _into_second = _prefetch_into(1), _prefetch_into(2)


@jit
def ask_for(address, size, level):
    """Ask for some bytes, which will soon be used.

    Processors prefetch by themselves, but here too late: the formula is so long that only a few elements fit into the
    window of instructions that they look at in advance. They go into the cache of a level, the first or the second.
    """
    if level == 1:
        for line in range(address, address + size, 64):
            _into_first(line)
    else:
        for line in range(address, address + size, 64):
            _into_second(line)
