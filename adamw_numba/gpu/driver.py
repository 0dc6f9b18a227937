"""CUDA's driver, called by the addresses of its functions: a step asks it and launches without Python in between.

A launch by Numba takes the host about 30 microseconds, and so do entering a context and asking an event; each of these
calls takes compiled code one to eight. And no interrupt can come among calls that one compiled function makes.

Compiled code passes every argument as an integer of 64 bits, also where C declares 32: on the machines that CUDA runs
on, both take one register, or eight bytes of the stack, of which the callee reads what it needs.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..arrays.compiled import cached, call_plain, entry_point, jit, pointer
from .memory import SIMULATED
from .words import THREADS

_POINTER, _UNSIGNED, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
# Those that compiled code calls come first, in the order of these positions in `addresses()`.
_GET, _PUSH, _POP, _LAUNCH, _COPY, _QUERY, _RECORD, _WAIT, _CAPTURE = range(9)
ARGUMENTS = {
    "cuCtxGetCurrent": [_POINTER],
    "cuCtxPushCurrent_v2": [_POINTER],
    "cuCtxPopCurrent_v2": [_POINTER],
    "cuLaunchKernel": [_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER],
    "cuMemcpyHtoDAsync_v2": [_POINTER, _POINTER, _SIZE, _POINTER],
    "cuEventQuery": [_POINTER],
    "cuEventRecord": [_POINTER, _POINTER],
    "cuStreamWaitEvent": [_POINTER, _POINTER, _UNSIGNED],
    "cuStreamIsCapturing": [_POINTER, _POINTER],
    "cuEventCreate": [_POINTER, _UNSIGNED],
    "cuEventDestroy_v2": [_POINTER],
    "cuEventSynchronize": [_POINTER],
    "cuMemAlloc_v2": [_POINTER, _SIZE],
    "cuStreamCreate": [_POINTER, _UNSIGNED],
    "cuStreamSynchronize": [_POINTER],
    "cuStreamDestroy_v2": [_POINTER],
    "cuThreadExchangeStreamCaptureMode": [_POINTER],
}
_NOT_READY = 600
_WITHOUT_TIMING, _NON_BLOCKING, _RELAXED = 2, 1, 2  # an event, a stream, a mode of capturing
ACTIVE, INVALIDATED = 1, 2  # the states of a capture; 0 is none

# A board: what the compiled functions know of one GPU.
BOARD_WORDS = 10
FUNCTIONS, CONTEXT, STREAM, ASK, CLEAR, DEVICE, MIRROR, TABLE, OUT, DEFAULT = range(BOARD_WORDS)
# A mirror: the bytes on the host, those sent last, how many words, where they go, and the ring of pinned buffers.
MIRROR_WORDS = 8
HOST, SENT, COUNT, TARGET, RING, RING_SIZE, NEXT, IS_SENT = range(MIRROR_WORDS)
# A launch: the kernel, how many blocks, its arguments, and where each of them stands.
LAUNCH_WORDS = 8
KERNEL, GRID, GROUP, FLAGS, AT_GROUP, AT_FLAGS, AT_TABLE, _SPARE = range(LAUNCH_WORDS)
DONE, BUSY = 0, -1
_DLPACK_CUDA = 2


@cache
def functions() -> dict[str, Any]:
    """The driver's functions by name, as `ctypes` calls them; in the simulator, what stands in for them."""
    if SIMULATED:
        from . import simulated_driver

        return {name: simulated_driver.function(name, arguments) for name, arguments in ARGUMENTS.items()}
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    found = {name: getattr(library, name) for name in ARGUMENTS}
    for name, function in found.items():
        function.argtypes = ARGUMENTS[name]
    return found


@cache
def addresses() -> np.ndarray[Any, Any]:
    """Where the functions are that compiled code calls."""
    chosen = list(functions().values())[: _CAPTURE + 1]
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in chosen], np.int64)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    code = functions()[name](*arguments)
    if code:
        raise RuntimeError(f"CUDA's {name} has failed with error {code}; expected a GPU that works")


def answer(name: str, *arguments: Any) -> int:
    """What a function of the driver returns by a pointer, its first argument."""
    found = ctypes.c_int64(0)
    call(name, ctypes.byref(found), *arguments)
    return found.value


class Event:
    """A mark in a stream, without a time.

    Attributes
    ----------
    handle : int
    """

    def __init__(self) -> None:
        self.handle = 0
        self.handle = answer("cuEventCreate", _WITHOUT_TIMING)

    def __del__(self) -> None:
        if self.handle and functions is not None:  # not while the interpreter ends
            functions()["cuEventDestroy_v2"](self.handle)

    def record(self, stream: int) -> None:
        """Mark all that a stream has been given up to now."""
        call("cuEventRecord", self.handle, stream)

    def hold(self, stream: int) -> None:
        """Have a stream wait until what was marked is done."""
        call("cuStreamWaitEvent", stream, self.handle, 0)

    def is_over(self) -> bool:
        """Whether what was marked is done."""
        return int(functions()["cuEventQuery"](self.handle)) == 0

    def synchronize(self) -> None:
        """Wait until what was marked is done."""
        call("cuEventSynchronize", self.handle)


def capture_of(stream: int) -> int:
    """Whether what is launched in a stream now goes into a graph: 0, `ACTIVE` or `INVALIDATED`."""
    found = ctypes.c_int32(0)
    call("cuStreamIsCapturing", stream, ctypes.byref(found))
    return found.value


def copy_for_capture(words: np.ndarray[Any, Any]) -> int:
    """The address of a copy on the device, made while a graph is captured and never freed.

    Memory is had, and waited for, in a stream of its own, with the checks of this thread relaxed: neither then belongs
    to the graph. (NCCL does it in the same way.)
    """
    mode = ctypes.c_int32(_RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        target = answer("cuMemAlloc_v2", words.nbytes)
        stream = answer("cuStreamCreate", _NON_BLOCKING)
        try:
            call("cuMemcpyHtoDAsync_v2", target, words.ctypes.data, words.nbytes, stream)
            call("cuStreamSynchronize", stream)
        finally:
            call("cuStreamDestroy_v2", stream)
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return target


# Compiled


@intrinsic
def _call(typingctx, function, arguments):
    """Call a C function of integers, which returns an error's number."""

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * len(values))
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), values), ir.IntType(64))

    return types.int64(types.int64, arguments), codegen


@jit
def _words(address, count):
    return carray(pointer(address, np.int64(0)), count)


@jit
def _enter(board, functions):
    """Make the GPU's context the current one; whether it was not, so that it has to be left."""
    out = board[OUT]
    _call(functions[_GET], (out,))
    if _words(out, 1)[0] == board[CONTEXT]:
        return False
    return _call(functions[_PUSH], (board[CONTEXT],)) == 0


@jit
def _leave(board, functions, entered):
    if entered:
        _call(functions[_POP], (board[OUT],))


@jit
def _differs(mirror):
    host, sent = _words(mirror[HOST], mirror[COUNT]), _words(mirror[SENT], mirror[COUNT])
    different = mirror[IS_SENT] == 0
    for k in range(mirror[COUNT]):
        different |= host[k] != sent[k]
    return different


@jit
def _send(functions, mirror, stream):
    """Copy the words of a mirror to the device, in the order of a stream; BUSY if no pinned buffer is free."""
    if mirror[RING_SIZE] == 0:
        return BUSY
    buffer, event = _words(mirror[RING] + 16 * mirror[NEXT], 2)
    code = _call(functions[_QUERY], (event,))
    if code != 0:
        return BUSY if code == _NOT_READY else code
    host, sent = _words(mirror[HOST], mirror[COUNT]), _words(mirror[SENT], mirror[COUNT])
    pinned = _words(buffer, mirror[COUNT])
    for k in range(mirror[COUNT]):
        pinned[k] = sent[k] = host[k]
    mirror[IS_SENT] = 0
    code = _call(functions[_COPY], (mirror[TARGET], buffer, 8 * mirror[COUNT], stream))
    if code != 0:
        return code
    mirror[NEXT] = (mirror[NEXT] + 1) % mirror[RING_SIZE]
    mirror[IS_SENT] = 1
    return _call(functions[_RECORD], (event, stream))


@entry_point
@cached(types.int64(types.int64, types.int64, types.int64))
def send(functions, mirror, stream):
    """Bring the device up to date with a mirror, in the order of a stream: DONE, BUSY, or an error's number."""
    m = _words(mirror, MIRROR_WORDS)
    return _send(_words(functions, _CAPTURE + 1), m, stream) if _differs(m) else DONE


@entry_point
@cached(types.boolean(types.int64))
def begins_as_before(board):
    """Whether a step can begin as the last one did, in the same stream; addresses that have changed are sent.

    False where a closer look is needed: another stream, one that is being captured, no buffer that is free.
    """
    b = _words(board, BOARD_WORDS)
    functions, out = _words(b[FUNCTIONS], _CAPTURE + 1), _words(b[OUT], 1)
    out[0] = b[STREAM]
    # The library's own function for its current stream, from DLPack's exchange API, where it has one.
    if b[ASK] != 0 and _call(b[ASK], (_DLPACK_CUDA, b[DEVICE], b[OUT])) != 0:
        call_plain(b[CLEAR])
        return False
    if out[0] != b[STREAM]:
        return False
    out[0] = 0
    # Nothing is captured in the default stream.
    if b[DEFAULT] == 0 and _call(functions[_CAPTURE], (b[STREAM], b[OUT])) != 0:
        return False
    if out[0] != 0:
        return False
    mirror = _words(b[MIRROR], MIRROR_WORDS)
    if not _differs(mirror):
        return True
    entered = _enter(b, functions)
    code = _send(functions, mirror, b[STREAM])
    _leave(b, functions, entered)
    return code == DONE


@entry_point
@cached(types.void(types.int64, types.int64, types.int64), nogil=True)
def launch(board, launches, count):
    """Launch kernels one after another.

    Without the interpreter's lock: where the GPU is far behind, the driver waits, perhaps for somebody who needs it.
    """
    b = _words(board, BOARD_WORDS)
    functions = _words(b[FUNCTIONS], _CAPTURE + 1)
    entered = _enter(b, functions)
    code = 0
    for k in range(count):
        at = launches + 8 * LAUNCH_WORDS * k
        row = _words(at, LAUNCH_WORDS)
        parameters = at + 8 * AT_GROUP
        arguments = (row[KERNEL], row[GRID], 1, 1, THREADS, 1, 1, 0, b[STREAM], parameters, 0)
        code = _call(functions[_LAUNCH], arguments)
        if code != 0:
            break
    _leave(b, functions, entered)
    if code != 0:
        raise RuntimeError("CUDA's cuLaunchKernel has failed with this error; expected a GPU that works", code)


@entry_point
@cached(types.void(types.int64, types.int64, types.int64, types.int64), nogil=True)
def hold(board, event, others, count):
    """Mark the end of the step in its stream, and have other streams go on after it."""
    b = _words(board, BOARD_WORDS)
    functions = _words(b[FUNCTIONS], _CAPTURE + 1)
    entered = _enter(b, functions)
    code = _call(functions[_RECORD], (event, b[STREAM]))
    for other in _words(others, count):
        if code == 0:
            code = _call(functions[_WAIT], (other, event, 0))
    _leave(b, functions, entered)
    if code != 0:
        raise RuntimeError("CUDA's cuStreamWaitEvent has failed with this error; expected a GPU that works", code)
