"""What Numba has no words for: 16-bit floats, the processor's floating-point mode, prefetching.

A 16-bit element is an integer to Numba: ``int16`` is float16, ``uint16`` is bfloat16.
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

AHEAD = 1024  # bytes before their turn, at which a loop asks for elements
# Modes of an x86 processor: no exceptions, round to nearest; and subnormal results become 0. A momentum whose
# gradients have stopped gets there after 830 steps, and stays; with such numbers a step takes twenty times as long.
EXACT, FLUSHING = np.uint32(0x1F80), np.uint32(0x9F80)
LEAST_FLUSHED = 2.0**-100  # a smaller factor of the gradients may itself be subnormal, and their product is not
_HAS_MODE = platform.machine() in ("x86_64", "AMD64")


# float16 and float32 by integers, for processors that have no instruction for it. No other arithmetic takes part than
# an exact sum that moves the bits of a subnormal number into place, so that the loops around stay vectors.


def half_to_float(bits):
    """The float32 of a float16's bits: exact, a signalling NaN made quiet."""
    word = np.uint32(np.uint16(bits))
    magnitude = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13))  # all of float16's mantissa, and its exponent
    # A subnormal number is so many times 2^-24: the mantissa of 2^-14, if 2^-14 is taken away again.
    small = np.float32(np.uint32(magnitude + np.uint32(0x38800000)).view(np.float32) - np.float32(2.0**-14))
    moved = np.uint32(magnitude + np.uint32(0x38000000))  # by the 112 between the biases of both exponents
    special = np.uint32(magnitude + np.uint32(0x70000000))  # infinities and NaN: twice as far
    special = np.uint32(special | np.uint32(0x00400000)) if special > np.uint32(0x7F800000) else special
    result = special if magnitude >= np.uint32(0x0F800000) else moved
    result = small.view(np.uint32) if magnitude < np.uint32(0x00800000) else result
    return np.uint32(result | np.uint32((word & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


def float_to_half(x):
    """The bits of the float16 nearest to a float32, ties to even; NaN stay NaN, quiet, with what fits of their bits."""
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # The processor rounds a subnormal number when it adds one half, whose last bit is worth as much as float16's.
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

    Where it has none it calls a function of C's runtime library, which is not there, and ends the process. Which
    processors have them is best known to LLVM itself: it is given one conversion.
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
    """The number that a stored element stands for."""
    raise NotImplementedError


@overload(widen, inline="always")
def _overload_widen(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return lambda x: _half_to_float(x)
    return lambda x: x


def narrow(x, like):
    """The stored element nearest to a number, ties to even."""
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
def exchange_mode(typingctx, mode):
    """Set the processor's register of floating-point modes; returns what it was."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        if not _HAS_MODE:
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


@jit
def mode_for(scale):
    """How to treat subnormal results, where gradients are multiplied with this."""
    return FLUSHING if scale >= LEAST_FLUSHED else EXACT


@intrinsic
def _prefetch(typingctx, address):
    """Ask for a line of memory that will soon be read; where none is, nothing happens."""

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        for_reading, keep, data = (ir.Constant(word, number) for number in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), for_reading, keep, data])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@jit
def ask_for(exists, address, count, step, ahead=AHEAD):
    """Ask for what comes after `count` elements of a dense run, in good time.

    The processor would ask too late by itself: its window holds few elements of so long a formula.
    """
    if exists is not None:
        for line in range(address + ahead, address + ahead + count * step, 64):
            _prefetch(line)
