"""What Numba has no words for: 16-bit floats, the processor's floating-point mode, prefetching.

A 16-bit element is an integer to Numba: ``int16`` is float16, ``uint16`` is bfloat16.
"""

import platform

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


@intrinsic
def _half_to_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


@intrinsic
def _float_to_half(typingctx, value):
    def codegen(context, builder, signature, args):
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
